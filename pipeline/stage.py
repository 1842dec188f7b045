"""One stage: the entering policy, the task's data, a trainer, and a folder that is whole or absent.

`sft.py` and `rft.py` are the scripts that `accelerate launch` starts; they share everything here but the trainer.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback, set_seed
from trl.models import prepare_deepspeed

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.readers import Part
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.hashing import hash_model
from mcit.eval.serving import Serving, read_serving, write_serving

from .adapters import Adapter, Factors, concat, hash_adapter, rank, save_adapter
from .arguments import check_mode, check_stage, deepspeed, processes
from .collator import Collator
from .disk import check_disk, lora_shapes, stage_needs
from .during import During, choose_probes
from .inputs import entering_hashes, stage_inputs
from .lineage import enter, fold, freeze, leave, target_names
from .live import Live, stage_cost
from .locks import locked
from .methods import Method, build_methods
from .preemption import EXIT_CODE, Preempted, deferred, preemptible
from .quantization import keep_trainable, quantised_options
from .recipe import ModelConfig, Recipe, Stage, load_recipe
from .replay import Replays
from .resume import Checkpointing, Interval
from .schedule import past_of, trained_in
from .start import stages_behind
from .trackers import set_environment
from .trainer import LOWER, FiniteLoss, ReallyDistributed, Untrained, fingerprint, idle_parameters, trained_parameters
from .workplace import Workplace, is_first_process
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
        with preemptible():
            recipe = load_recipe(options.recipe, options.overrides)
            here = Path(options.recipe) if Path(options.recipe).is_dir() else Path("runs") / recipe.name
            run_stage(recipe, options.stage, options.run_dir or here, paradigm, make_trainer)
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
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
    Goes on from the last checkpoint, if there is one. Raises `InputError`, and `Preempted` after a checkpoint when the
    process was asked to stop.
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
    before_dir = run_dir / "stages" / (recipe.stages[k - 2].folder if k > 1 else "00-base")
    inputs = stage_inputs(recipe, stage, run_dir, entering_hashes(before_dir))
    work = Workplace(run_dir / "stages" / stage.folder, hash_json(inputs))
    with contextlib.ExitStack() as stack:
        if is_first_process():
            lock = run_dir / "steps" / f"stage-{k}.lock"  # for whoever starts a stage by hand; runs lock the step
            stack.enter_context(locked(lock, f"stage {k} of {run_dir}"))
        if work.is_done():
            print(f"stage {k} is done: {work.stage_dir}", flush=True)
        else:
            _train_stage(recipe, stage, run_dir, before_dir, work, make_trainer)
        if is_first_process():
            work.remove()


def _train_stage(
    recipe: Recipe, stage: Stage, run_dir: Path, before_dir: Path, work: Workplace, make_trainer: MakeTrainer
) -> None:
    """`run_stage`, after what can be refused at once."""
    start, k = time.monotonic(), stage.k
    before = read_serving(before_dir)
    methods = build_methods(recipe.method, stage.train)
    carrier = next((method for method in methods if method.carries), None)
    if before.kind in ("merged", "extended") and carrier is None and not before.carried:
        what = {"merged": "a merged model", "extended": "an extended model"}[before.kind]
        problem = f"is {what}, and a stage starts from the base or an adapter on it"
        raise InputError(problem, where=before_dir / "serving.json")
    entering = before.carried or (before.path if before.kind == "adapter" else None)
    previous = before_dir / entering if entering else None

    tasks = {name: read_task(run_dir / "data" / name) for name in (*stage.tasks, *stage.visitors)}
    samples = _trained(recipe, stage, run_dir)
    anchors = {anchor.name: read_task(run_dir / "data" / anchor.name) for anchor in recipe.anchors}
    general = [one for name, task in anchors.items() for one in _samples(run_dir / "data" / name, task, "train")]
    keeps = any(method.keeps == "past data" for method in methods)
    past = past_of(recipe.stages, k, samples, lambda earlier: _trained(recipe, earlier, run_dir)) if keeps else {}
    states = {method.name: _load_state(before_dir, method) for method in methods}
    for method in methods:
        kept = past if method.keeps == "past data" else {}
        samples = method.data(stage, samples, kept, states[method.name])
    tasks |= {name: read_task(run_dir / "data" / name) for name in {one["task"] for one in samples} - tasks.keys()}
    replays = Replays(samples, {method.name: wanted for method in methods if (wanted := method.replay(general))})

    # Not the recipe's seed itself: every stage would start from the same LoRA factors and the same order.
    seed = (recipe.seed * 1_000_003 + stages_behind(run_dir / "stages" / "00-base") + k) % 2**31
    set_seed(seed)
    model, processor = load_model(recipe.base_model), load_processor(recipe.base_model)
    if not torch.cuda.is_available() and model.num_parameters() < _TINY:
        torch.set_num_threads(1)
    if is_first_process():
        shapes = lora_shapes(model, target_names(model, stage.train.modules))
        check_disk(run_dir, stage_needs(stage, model, shapes, before.rank or 0, methods), f"stage {k}")
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
        work.folder,
        [*callbacks, FiniteLoss(stage)],
    )
    set_environment(recipe.name, stage.folder, run_dir, work.fingerprint)
    trainer: Any = make_trainer(entered)
    trainer.take_on(entered, methods, idle_parameters(tuned))
    trainer.mode = mode = _mode(trainer)
    check_mode(recipe, methods, mode)
    if mode == "zero3":
        keep_whole(trainer, list(trained_parameters(tuned).values()))
    trainer.add_callback(ReallyDistributed(trainer))
    trainer.add_callback(untrained := Untrained(tuned))
    trainer.checkpoints = work.checkpoints
    if trainer.accelerator.is_main_process:
        work.claim()
    trainer.accelerator.wait_for_everyone()
    checkpoint = trainer.last_checkpoint(notes := list[str]())
    trainer.add_callback(live := Live(work.folder, start))
    during = _during(entered, trainer, run_dir, context) if recipe.eval.during else None
    if during:
        trainer.stateful["during"] = during
    with deferred() as asked:  # it stops where it can go on, and once it is trained it is written
        trainer.add_callback(Checkpointing(trainer, Interval.of(stage.train.checkpoint_every), asked, checkpoint))
        if during:
            trainer.add_callback(during)
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except Preempted:
            trainer.accelerator.end_training()
            raise
        _check_trained(stage, untrained.fingerprint, fingerprint(tuned))
        size = sum(parameter.numel() for parameter in trained_parameters(tuned).values())
        if carrier:
            save = partial(_save_merged, carrier, tuned, processor)
        else:
            save = partial(_save_adapters, *leave(tuned, previous, stage.train), recipe.base_model, before)
        states = {method.name: method.finish(tuned, samples) for method in methods}
        seconds = live.seconds
        cost = stage_cost(trainer, seconds, stage.train.global_batch_size)
        if trainer.accelerator.is_main_process:
            output = work.finished
            served = save(methods, states, output)
            for name, state in states.items():
                _save_state(output, name, state)
            write_jsonl(output / "train_log.jsonl", map(_finite, trainer.state.log_history))
            write_serving(output, before.model_copy(update={"stage": k, "name": stage.name, **served}))
            summary = {
                "fingerprint": work.fingerprint,
                "seconds": seconds,
                "steps": trainer.state.global_step,
                "samples": len(samples),
                "processes": trainer.accelerator.num_processes,
                "mode": mode,
                "trained_parameters": size,
                "cost": cost,
                "notes": notes,
            }
            if during:
                during.write(output)
                summary["during"] = during.summary()
            write_json(output / "trained.json", summary)
            replace_folder(output, work.stage_dir)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


def _check_trained(stage: Stage, before: dict[str, float], after: dict[str, float]) -> None:
    """Training has moved weights, and to where numbers are. Raises `InputError`."""
    where, field = f"stage {stage.name}", f"train.{stage.train.paradigm}.args"
    if not all(math.isfinite(value) for value in after.values()):
        raise InputError("training ended with weights that are not finite", where=where, field=field, remedy=LOWER)
    if before == after:
        remedy = "Look at the learning rate, the number of steps and the rewards"
        raise InputError("training changed no weight", where=where, field=field, remedy=remedy)


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
