"""One stage: the entering policy, the task's data, a trainer, and a folder that is whole or absent.

`sft.py` and `rft.py` are the scripts that `accelerate launch` starts; they share everything here but the trainer.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from trl.models import prepare_deepspeed

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.readers import Part
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, read_serving, write_serving

from .adapters import Adapter, Factors, concat, hash_adapter, rank, save_adapter
from .arguments import check_stage, deepspeed, processes
from .collator import Collator
from .during import During, choose_probes
from .lineage import enter, fold, freeze, leave
from .methods import Method, build_methods
from .quantization import keep_trainable, quantised_options
from .recipe import ModelConfig, Recipe, Stage, load_recipe
from .replay import Replays
from .schedule import trained_in
from .start import stages_behind
from .trainer import FiniteLoss, ReallyDistributed, Untrained, fingerprint, idle_parameters, trained_parameters
from .zero3 import keep_whole

if TYPE_CHECKING:
    from transformers import Trainer


@dataclasses.dataclass(frozen=True)
class Entered:
    """A stage with everything its trainer is made from."""

    recipe: Recipe
    stage: Stage
    seed: int
    model: Any  # a PeftModel, or what a method that carries the policy has made of the base
    processor: Any
    samples: list[Sample]  # image paths absolute
    replays: Replays  # these, and what methods see beside them
    tasks: dict[str, PreparedTask]
    anchors: dict[str, PreparedTask]
    max_length: int  # tokens
    before: Serving  # how the stage before is served
    previous: Path | None  # the entering policy's adapter folder; None for the base
    output_dir: Path
    callbacks: list[TrainerCallback]

    @property
    def enters_base(self) -> bool:
        """Whether the stage begins with the untouched base: a fresh LoRA changes nothing yet, new experts do."""
        entered = self.before.kind == "base" or self.stage.train.lineage == "independent"
        return entered and isinstance(self.model, PeftModel)

    def load_base(self, accelerator: Any) -> Any:
        """The untouched base once more, on the accelerator's devices, to be looked at."""
        base = load_model(self.recipe.base_model)
        return prepare_deepspeed(base, accelerator).module if deepspeed() else base.to(accelerator.device)


MakeTrainer = Callable[[Entered], "Trainer"]
DISTRIBUTED = ("single", "ddp", "zero2", "zero3")  # what stages run under
# Parameters below which threads wait for each other longer than they work: 63 steps of the embedded model take 12 s
# with one thread and, on two cores, 14 to 27 with two.
_TINY = 10_000_000
MAX_RANK = 512  # the largest that vLLM serves


def main(paradigm: str, make_trainer: MakeTrainer) -> None:
    """Command line of a stage script. Exits 2 with one line, `error: …`, for bad input."""
    parser = argparse.ArgumentParser(description=f"Train one stage of a recipe ({paradigm}).")
    parser.add_argument("--recipe", required=True, help="recipe file, packaged name, or run directory")
    parser.add_argument("--stage", required=True, type=int, help="1 is the first task")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<the recipe's name>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    options = parser.parse_args()
    # DeepSpeed and TRL read these when they are imported or used; a user's own setting wins.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if processes() == 1:  # transformers would spread one process over all GPUs that it sees, which TRL refuses
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        here = Path(options.recipe) if Path(options.recipe).is_dir() else Path("runs") / recipe.name
        run_stage(recipe, options.stage, options.run_dir or here, paradigm, make_trainer)
    except InputError as error:
        # Every process says it: the launcher kills the others when the first one ends. A worker of the data loader
        # wraps its own in a traceback.
        print(f"error: {str(error).rpartition('InputError: ')[2]}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = f"Lower train.{paradigm}.args.per_device_train_batch_size: the global batch stays what it is"
        print(f"error: {str(error).splitlines()[0]} {remedy}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_stage(recipe: Recipe, k: int, run_dir: Path, paradigm: str, make_trainer: MakeTrainer) -> None:
    """Train stage `k` and write `RUN/stages/<kk>-<name>/`; every process of a launch calls it.

    Needs the prepared data in `RUN/data/` and the stage before, as `serving.json` in its folder (stage 0: the base).
    Raises `InputError`.
    """
    if not 1 <= k <= len(recipe.stages):
        raise InputError(
            f"the stream has stages 1 to {len(recipe.stages)}, not {k}", where=recipe.name, field="--stage"
        )
    stage = recipe.stages[k - 1]
    check_stage(stage)
    if stage.train.paradigm != paradigm:
        raise InputError(
            f"stage {k} is {stage.train.paradigm}, and this is pipeline/{paradigm}.py",
            where=recipe.name,
            field="train.paradigm",
            remedy=f"Start pipeline/{stage.train.paradigm}.py",
        )
    start = time.monotonic()
    stages = run_dir / "stages"
    before_dir = stages / (recipe.stages[k - 2].folder if k > 1 else "00-base")
    before = read_serving(before_dir)
    methods = build_methods(recipe.method, stage.train)
    carrier = next((method for method in methods if method.carries), None)
    if before.kind in ("merged", "extended") and carrier is None and not before.carried:
        what = {"merged": "a merged model", "extended": "an extended model"}[before.kind]
        problem = f"is {what}, and a stage starts from the base or an adapter on it"
        raise InputError(problem, where=before_dir / "serving.json")
    entering = before.carried or (before.path if before.kind == "adapter" else None)
    previous = before_dir / entering if entering else None
    output = stages / f".{stage.folder}.partial"

    tasks = {name: read_task(run_dir / "data" / name) for name in (*stage.tasks, *stage.visitors)}
    samples = _trained(recipe, stage, run_dir)
    anchors = {anchor.name: read_task(run_dir / "data" / anchor.name) for anchor in recipe.anchors}
    general = [one for name, task in anchors.items() for one in _samples(run_dir / "data" / name, task, "train")]
    past = _past(recipe, stage, samples, run_dir) if any(method.keeps == "past data" for method in methods) else {}
    states = {method.name: _load_state(before_dir, method) for method in methods}
    for method in methods:
        kept = past if method.keeps == "past data" else {}
        samples = method.data(stage, samples, kept, states[method.name])
    tasks |= {name: read_task(run_dir / "data" / name) for name in {one["task"] for one in samples} - tasks.keys()}
    replays = Replays(samples, {method.name: wanted for method in methods if (wanted := method.replay(general))})

    # Not the recipe's seed itself: every stage would start from the same LoRA factors and the same order.
    seed = (recipe.seed * 1_000_003 + stages_behind(stages / "00-base") + k) % 2**31
    set_seed(seed)
    model, processor = load_model(recipe.base_model), load_processor(recipe.base_model)
    if not torch.cuda.is_available() and model.num_parameters() < _TINY:
        torch.set_num_threads(1)
    context = model.config.get_text_config().max_position_embeddings
    max_length = min(stage.train.max_length or context, context)
    if carrier:
        tuned: Any = carrier.enter(model, states[carrier.name], Collator(processor, [], max_length))
    else:
        tuned = enter(model, previous, stage.train)
    for method in methods:
        method.build(tuned, states[method.name])
    freeze(model.get_encoder("image"))
    callbacks = [callback for method in methods for callback in method.callbacks()]
    entered = Entered(
        recipe,
        stage,
        seed,
        tuned,
        processor,
        samples,
        replays,
        tasks,
        anchors,
        max_length,
        before,
        previous,
        output,
        [*callbacks, FiniteLoss()],
    )
    trainer: Any = make_trainer(entered)
    trainer.take_on(entered, methods, idle_parameters(tuned))
    mode = _mode(trainer)
    if mode not in DISTRIBUTED:
        raise InputError(f"stages do not run under {mode}", where="--launch", remedy=f"Use {', '.join(DISTRIBUTED)}")
    for method in methods:
        if mode not in method.distributed:
            raise InputError(f"does not run under {mode}", where="recipe", field=f"method.{method.name}")
    if mode == "zero3" and recipe.eval.during:  # its processes ask different numbers of times, and would wait forever
        raise InputError("does not run under zero3", where="recipe", field="eval.during", remedy="Leave it out")
    if mode == "zero3":
        keep_whole(trainer, list(trained_parameters(tuned).values()))
    trainer.add_callback(ReallyDistributed(trainer))
    trainer.add_callback(untrained := Untrained(tuned))
    during = _during(entered, trainer, run_dir, context) if recipe.eval.during else None
    if during:
        trainer.add_callback(during)

    trainer.train()
    trained = fingerprint(tuned)
    if not all(math.isfinite(value) for value in trained.values()):
        raise RuntimeError(f"stage {k}: training ended with weights that are not finite")
    if untrained.fingerprint == trained:
        raise RuntimeError(f"stage {k}: training changed no weight")

    size = sum(parameter.numel() for parameter in trained_parameters(tuned).values())
    if carrier:
        save = partial(_save_merged, carrier, tuned, processor)
    else:
        save = partial(_save_adapters, *leave(tuned, previous, stage.train), recipe.base_model, before)
    states = {method.name: method.finish(tuned, samples) for method in methods}
    if trainer.accelerator.is_main_process:
        shutil.rmtree(output, ignore_errors=True)  # what the trainer, or a process that was killed, left there
        served = save(methods, states, output)
        for name, state in states.items():
            _save_state(output, name, state)
        write_jsonl(output / "train_log.jsonl", map(_finite, trainer.state.log_history))
        write_serving(output, before.model_copy(update={"stage": k, "name": stage.name, **served}))
        summary = {
            "seconds": round(time.monotonic() - start, 3),
            "steps": trainer.state.global_step,
            "samples": len(samples),
            "processes": trainer.accelerator.num_processes,
            "mode": mode,
            "trained_parameters": size,
            "peak_memory_bytes": _peak_memory(),
        }
        if during:
            during.write(output)
            summary["during"] = during.summary()
        write_json(output / "trained.json", summary)
        replace_folder(output, stages / stage.folder)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def load_model(base: ModelConfig) -> Any:
    """The untouched base model in the recipe's dtype: on the CPU, or, quantised, on the process's device."""
    model = AutoModelForImageTextToText.from_pretrained(
        base.path,
        revision=base.revision,
        trust_remote_code=base.trust_remote_code,
        use_safetensors=True,  # never a pickle
        dtype=getattr(torch, base.dtype),
        **quantised_options(base),
    )
    keep_trainable(model)
    return model


def load_processor(base: ModelConfig) -> Any:
    """The base model's processor with the recipe's settings (`min_pixels`, `max_pixels`, …)."""
    return AutoProcessor.from_pretrained(
        base.path, revision=base.revision, trust_remote_code=base.trust_remote_code, **base.processor
    )


def replace_folder(source: Path, target: Path) -> None:
    """Put `source` where `target` is. In between there is no `target`, never half of one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _samples(folder: Path, task: PreparedTask, part: Part) -> list[Sample]:
    folder = folder.resolve()
    return [
        {**sample, "images": [str(image_path(folder, task, image)) for image in sample["images"]]}
        for sample in read_samples(folder, part)
    ]


def _trained(recipe: Recipe, stage: Stage, run_dir: Path) -> list[Sample]:
    """What a stage trains."""
    return [
        sample
        for name in (*stage.tasks, *stage.visitors)
        for sample in trained_in(
            _samples(run_dir / "data" / name, read_task(run_dir / "data" / name), "train"),
            stage.k,
            recipe.homes(name),
            len(recipe.stages),
            recipe.blur,
            recipe.seed,
        )
    ]


def _past(recipe: Recipe, stage: Stage, samples: Iterable[Sample], run_dir: Path) -> dict[int, list[Sample]]:
    """What earlier stages trained and `stage` does not, each sample by the stage that trained it last."""
    seen = {(sample["task"], sample["id"]) for sample in samples}
    past = {}
    for earlier in reversed(recipe.stages[: stage.k - 1]):
        past[earlier.k] = [
            sample for sample in _trained(recipe, earlier, run_dir) if (sample["task"], sample["id"]) not in seen
        ]
        seen |= {(sample["task"], sample["id"]) for sample in past[earlier.k]}
    return {k: past[k] for k in sorted(past) if past[k]}


def _during(entered: Entered, trainer: "Trainer", run_dir: Path, context: int) -> During:
    """What is asked while the stage trains: every task learned by its end, in the order of the matrix's columns."""
    recipe, config = entered.recipe, entered.recipe.eval.during
    assert config is not None
    folders = {task: run_dir / "data" / task for task, first in recipe.learned.items() if first <= entered.stage.k}
    tasks = {task: read_task(folder) for task, folder in folders.items()}
    probes = {task: choose_probes(_samples(folders[task], tasks[task], "test"), config.probes) for task in tasks}
    collator = Collator(entered.processor, [], context, padding_side="left")
    return During(trainer, config, tasks, probes, collator)


def _save_adapters(
    policy: Adapter,
    delta: Adapter,
    base: ModelConfig,
    before: Serving,
    methods: Sequence[Method],
    states: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Write a LoRA policy and its increment, and what a method has evaluated in its place; how that is served."""
    save_adapter(folder / "delta", delta, before.base, before.revision)
    found = (method.served(policy, states[method.name]) for method in methods)
    served = next((changes for changes in found if changes is not None), None)
    if served is None:
        save_adapter(folder / "adapter", policy, before.base, before.revision)
        return _as_adapter(folder, policy)
    save_adapter(folder / "carried", policy, before.base, before.revision)
    if all(isinstance(change, Factors) or min(change.delta().shape) <= MAX_RANK for change in served.values()):
        thin = concat([{name: c if isinstance(c, Factors) else c.factors() for name, c in served.items()}])
        save_adapter(folder / "adapter", thin, before.base, before.revision)
        return _as_adapter(folder, thin) | {"carried": "carried"}
    model = load_model(base)
    fold(model, served)
    for part in (model, load_processor(base)):
        part.save_pretrained(folder / "merged")
    return _as_model(folder, "merged") | {"carried": "carried"}


def _as_adapter(folder: Path, adapter: Adapter) -> dict[str, Any]:
    digest = hash_adapter(folder / "adapter")
    return {"kind": "adapter", "path": "adapter", "rank": rank(adapter), "hash": digest, "carried": None}


def _as_model(folder: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "path": kind, "rank": None, "hash": hash_model(str(folder / kind)), "carried": None}


def _save_merged(
    carrier: Method, model: Any, processor: Any, methods: Sequence[Method], states: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Write what a method carries; how it is served."""
    carrier.leave(model, processor, folder / carrier.carried_as)
    return _as_model(folder, carrier.carried_as)


def _state_file(folder: Path, name: str) -> Path:
    return folder / "method" / f"{name}.safetensors"


def _save_state(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    if state:
        file = _state_file(folder, name)
        file.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, file)


def _load_state(folder: Path, method: Method) -> dict[str, torch.Tensor]:
    file = _state_file(folder, method.name)
    return load_file(file) if file.exists() else {}


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A log row for JSON: a figure that is undefined (the mean over no answers, say) is null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _mode(trainer: "Trainer") -> str:
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None:
        return f"zero{max(plugin.zero_stage, 2)}"
    return "ddp" if trainer.accelerator.num_processes > 1 else "single"


def _peak_memory() -> int:
    """Of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
