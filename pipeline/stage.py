"""One stage: the entering policy, the task's data, a trainer, and a folder that is whole or absent.

`sft.py` and `rft.py` are the scripts that `accelerate launch` starts; they share everything here but the trainer.
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from trl.models import prepare_deepspeed

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.readers import Part
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, read_serving, write_serving

from .adapters import Adapter, concat, hash_adapter, live_adapter, load_adapter, rank, save_adapter
from .arguments import check_stage, deepspeed, processes
from .collator import Collator
from .during import During, choose_probes
from .lineage import enter, fold, freeze, leave, load_past, resume, save_whole
from .methods import Method, build_methods
from .recipe import ModelConfig, Phase, Recipe, Stage, load_recipe
from .replay import Replays
from .schedule import trained_in
from .trainer import FiniteLoss, ReallyDistributed, Untrained, fingerprint, idle_parameters, trained_parameters
from .zero3 import keep_whole

if TYPE_CHECKING:
    from transformers import Trainer


@dataclasses.dataclass(frozen=True)
class Entered:
    """A stage with everything its trainer is made from."""

    recipe: Recipe
    stage: Stage
    phase: Phase  # of the stage's
    seed: int
    model: Any  # a PeftModel, or under lineage `full` or by a method that carries the policy a model without adapters
    processor: Any
    samples: list[Sample]  # image paths absolute
    replays: Replays  # these, and what methods see beside them
    tasks: dict[str, PreparedTask]
    anchors: dict[str, PreparedTask]
    max_length: int  # tokens
    before: Serving  # how the stage before is served
    previous: Path | None  # the entering policy's adapter folder; None for the base and for merged models
    weights: Path | None  # of lineage `full`: the model that is entered, where it is not the base
    resumed: Path | None  # what the stage's phase before this one has left
    output_dir: Path
    callbacks: list[TrainerCallback]

    @property
    def enters_base(self) -> bool:
        """Whether the stage begins with the untouched base: a fresh LoRA changes nothing yet, new experts do."""
        entered = self.before.kind == "base" or self.stage.train.lineage == "independent"
        plain = isinstance(self.model, PeftModel) or self.stage.train.lineage == "full"
        return entered and plain and self.resumed is None

    def load_base(self, accelerator: Any) -> Any:
        """The untouched base once more, on the accelerator's devices, to be looked at."""
        return _placed(load_model(self.recipe.base_model), accelerator)

    def load_entering(self, accelerator: Any) -> Any:
        """The policy that this phase begins with once more, as a model without adapters, to be looked at."""
        model = load_model(self.recipe.base_model, self.weights)
        if self.weights is None:
            fold(model, load_past(self.previous, self.stage.train))
        return _placed(model, accelerator)


MakeTrainer = Callable[[Entered], "Trainer"]
DISTRIBUTED = ("single", "ddp", "zero2", "zero3")  # what stages run under
# Parameters below which threads wait for each other longer than they work: 63 steps of the embedded model take 12 s
# with one thread and, on two cores, 14 to 27 with two.
_TINY = 10_000_000


def main(phase: Phase, make_trainer: MakeTrainer) -> None:
    """Command line of a stage script. Exits 2 with one line, `error: …`, for bad input."""
    parser = argparse.ArgumentParser(description=f"Train one stage of a recipe ({phase}).")
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
        run_stage(recipe, options.stage, options.run_dir or here, phase, make_trainer)
    except InputError as error:
        # Every process says it: the launcher kills the others when the first one ends. A worker of the data loader
        # wraps its own in a traceback.
        print(f"error: {str(error).rpartition('InputError: ')[2]}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = f"Lower train.{phase}.args.per_device_train_batch_size: the global batch stays what it is"
        print(f"error: {str(error).splitlines()[0]} {remedy}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_stage(recipe: Recipe, k: int, run_dir: Path, phase: Phase, make_trainer: MakeTrainer) -> None:
    """Train stage `k` and write `RUN/stages/<kk>-<name>/`; every process of a launch calls it.

    Needs the prepared data in `RUN/data/` and the stage before, as `serving.json` in its folder (stage 0: the base).
    Of a stage of two phases the first writes `Stage.half_folder`, with which the second begins. Raises `InputError`.
    """
    if not 1 <= k <= len(recipe.stages):
        raise InputError(
            f"the stream has stages 1 to {len(recipe.stages)}, not {k}", where=recipe.name, field="--stage"
        )
    stage = recipe.stages[k - 1]
    check_stage(stage)
    phases, whole = stage.train.phases, stage.train.lineage == "full"
    if phase not in phases:
        raise InputError(
            f"stage {k} is {stage.train.paradigm}, and this is pipeline/{phase}.py",
            where=recipe.name,
            field="train.paradigm",
            remedy=f"Start pipeline/{phases[0]}.py",
        )
    if len(phases) > 1 and recipe.eval.during:
        raise InputError(f"does not look into {stage.train.paradigm}", where=recipe.name, field="eval.during")
    start = time.monotonic()
    stages = run_dir / "stages"
    resumed = stages / stage.half_folder if phase != phases[0] else None
    if resumed and not resumed.exists():
        raise InputError(f"stage {k} has no {phases[0]} yet", where=resumed, remedy=f"Start pipeline/{phases[0]}.py")
    before_dir = stages / (recipe.stages[k - 2].folder if k > 1 else "00-base")
    before = read_serving(before_dir)
    methods = build_methods(recipe.method, stage.train)
    carrier = next((method for method in methods if method.carries), None)
    if before.kind == "merged" and carrier is None and not whole:
        raise InputError(
            "is a merged model, and a stage starts from the base or an adapter on it", where=before_dir / "serving.json"
        )
    policy = before_dir / before.path if before.path else None
    previous = policy if before.kind == "adapter" else None
    weights = policy if whole and before.kind == "merged" else None
    if whole and resumed:
        weights = resumed / "merged"
    output = stages / f".{stage.folder}.partial"

    tasks = {name: read_task(run_dir / "data" / name) for name in (*stage.tasks, *stage.visitors)}
    samples = [
        sample
        for name, task in tasks.items()
        for sample in trained_in(
            _samples(run_dir / "data" / name, task, "train"),
            k,
            recipe.homes(name),
            len(recipe.stages),
            recipe.blur,
            recipe.seed,
        )
    ]
    anchors = {anchor.name: read_task(run_dir / "data" / anchor.name) for anchor in recipe.anchors}
    general = [one for name, task in anchors.items() for one in _samples(run_dir / "data" / name, task, "train")]
    for method in methods:
        samples = method.data(stage, samples)
    replays = Replays(samples, {method.name: wanted for method in methods if (wanted := method.replay(general))})

    # Not the recipe's seed itself: every stage would start from the same LoRA factors and the same order.
    seed = (recipe.seed * 1_000_003 + k) % 2**31
    set_seed(seed)
    model, processor = load_model(recipe.base_model, weights), load_processor(recipe.base_model)
    loaded = copy.deepcopy((model.config, model.generation_config))
    if not torch.cuda.is_available() and model.num_parameters() < _TINY:
        torch.set_num_threads(1)
    context = model.config.get_text_config().max_position_embeddings
    max_length = min(stage.train.max_length or context, context)
    states = {method.name: _load_state(before_dir, method) for method in methods}
    if carrier:
        tuned: Any = carrier.enter(model, states[carrier.name], Collator(processor, [], max_length))
    else:
        tuned = enter(model, None if weights else previous, stage.train)
        if resumed and not whole:
            resume(tuned, load_adapter(resumed / "adapter"), resumed)
    for method in methods:
        method.build(tuned, states[method.name])
    freeze(model.get_encoder("image"))
    callbacks = [callback for method in methods for callback in method.callbacks()]
    entered = Entered(
        recipe,
        stage,
        phase,
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
        weights,
        resumed,
        output,
        [*callbacks, FiniteLoss()],
    )
    trainer: Any = make_trainer(entered)
    trainer.take_on(entered, methods, idle_parameters(tuned, sparse=carrier is not None))
    mode = _mode(trainer)
    if mode not in DISTRIBUTED:
        raise InputError(f"stages do not run under {mode}", where="--launch", remedy=f"Use {', '.join(DISTRIBUTED)}")
    for method in methods:
        if mode not in method.distributed:
            raise InputError(f"does not run under {mode}", where="recipe", field=f"method.{method.name}")
    if mode == "zero3" and whole:
        raise InputError("does not run under zero3", where="recipe", field="train.lineage: full", remedy="Use zero2")
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
    last = phase == phases[-1]
    if carrier:
        save = partial(_save_merged, partial(carrier.leave, tuned, processor))
    elif whole:
        save = partial(_save_merged, partial(save_whole, tuned, processor, before.dtype, loaded))
    elif last:
        save = partial(_save_adapters, *leave(tuned, previous, stage.train), before)
    else:
        save = partial(_save_half, concat([live_adapter(tuned)]), before)
    states = {method.name: method.finish(tuned, samples) for method in methods} if last else {}
    if trainer.accelerator.is_main_process:
        shutil.rmtree(output, ignore_errors=True)  # what the trainer, or a process that was killed, left there
        served = save(output)
        for name, state in states.items():
            _save_state(output, name, state)
        log = read_jsonl(resumed / "train_log.jsonl") if resumed else []
        write_jsonl(output / "train_log.jsonl", [*log, *map(_finite, trainer.state.log_history)])
        summary = {
            "seconds": round(time.monotonic() - start, 3),
            "steps": trainer.state.global_step,
            "samples": len(samples),
            "processes": trainer.accelerator.num_processes,
            "mode": mode,
            "trained_parameters": size,
            "peak_memory_bytes": _peak_memory(),
            **trainer.report(),
        }
        if not last:
            summary["hash"] = served["hash"]
        if resumed:
            summary[phases[0]] = read_json(resumed / "trained.json")
        if during:
            during.write(output)
            summary["during"] = during.summary()
        write_json(output / "trained.json", summary)
        if last:
            write_serving(output, before.model_copy(update={"stage": k, "name": stage.name, **served}))
        replace_folder(output, stages / stage.folder if last else stages / stage.half_folder)
        if resumed:
            shutil.rmtree(resumed)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def load_model(base: ModelConfig, weights: Path | None = None) -> Any:
    """The untouched base model, or the merged one in `weights`, on the CPU, in the recipe's dtype."""
    return AutoModelForImageTextToText.from_pretrained(
        weights or base.path,
        revision=None if weights else base.revision,
        trust_remote_code=base.trust_remote_code,
        dtype=getattr(torch, base.dtype),
    )


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


def _placed(model: Any, accelerator: Any) -> Any:
    """A model that is only looked at, on the accelerator's devices."""
    return prepare_deepspeed(model, accelerator).module if deepspeed() else model.to(accelerator.device)


def _samples(folder: Path, task: PreparedTask, part: Part) -> list[Sample]:
    folder = folder.resolve()
    return [
        {**sample, "images": [str(image_path(folder, task, image)) for image in sample["images"]]}
        for sample in read_samples(folder, part)
    ]


def _during(entered: Entered, trainer: "Trainer", run_dir: Path, context: int) -> During:
    """What is asked while the stage trains: every task learned by its end, in the order of the matrix's columns."""
    recipe, config = entered.recipe, entered.recipe.eval.during
    assert config is not None
    folders = {task: run_dir / "data" / task for task, first in recipe.learned.items() if first <= entered.stage.k}
    tasks = {task: read_task(folder) for task, folder in folders.items()}
    probes = {task: choose_probes(_samples(folders[task], tasks[task], "test"), config.probes) for task in tasks}
    collator = Collator(entered.processor, [], context, padding_side="left")
    return During(trainer, config, tasks, probes, collator)


def _save_adapters(policy: Adapter, delta: Adapter, before: Serving, folder: Path) -> dict[str, Any]:
    """Write a LoRA policy and its increment; how it is served."""
    save_adapter(folder / "adapter", policy, before.base, before.revision)
    save_adapter(folder / "delta", delta, before.base, before.revision)
    return {"kind": "adapter", "path": "adapter", "rank": rank(policy), "hash": hash_adapter(folder / "adapter")}


def _save_half(trained: Adapter, before: Serving, folder: Path) -> dict[str, Any]:
    """Write the LoRA that another phase trains on; it is not served."""
    save_adapter(folder / "adapter", trained, before.base, before.revision)
    return {"hash": hash_adapter(folder / "adapter")}


def _save_merged(write: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Write a policy that is a whole model; how it is served."""
    write(folder / "merged")
    return {"kind": "merged", "path": "merged", "rank": None, "hash": hash_model(str(folder / "merged"))}


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
