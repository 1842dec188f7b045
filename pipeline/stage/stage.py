"""One stage: it enters a policy, trains it, and leaves a folder that is whole or absent.

`sft.py` and `rft.py` are the scripts that `accelerate launch` starts; they share everything here but the trainer. What
a stage begins with is in `entering.py`, what it leaves in `leaving.py`.
"""

import argparse
import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcit.data_prep.errors import InputError, not_written
from mcit.data_prep.files import hash_json, read_json, read_jsonl, write_json, write_jsonl
from mcit.data_prep.prepare import read_task
from mcit.eval.serving import write_serving

from ..recipe.loading import load_recipe
from ..recipe.schema import Phase, Recipe, Stage
from ..run.inputs import entering_hashes, stage_inputs
from ..run.locks import locked
from ..run.preemption import EXIT_CODE, Preempted, deferred, preemptible
from ..training.arguments import check_mode, check_stage, processes
from ..training.collator import Collator
from ..training.parameters import fingerprint, idle_parameters, trained_parameters
from ..training.trainer import LOWER, ReallyDistributed, Untrained
from ..training.zero3 import keep_whole
from .during import During, choose_probes
from .entering import Entered, enter_stage, samples_of
from .leaving import Save, States, finite, replace_folder, save_state, what_to_save
from .live import Live, both, stage_cost
from .resume import Checkpointing, Interval
from .trackers import set_environment
from .workplace import Workplace, is_first_process

if TYPE_CHECKING:
    from transformers import Trainer

MakeTrainer = Callable[[Entered], "Trainer"]


def main(phase: Phase, make_trainer: MakeTrainer) -> None:
    """Command line of a stage script. Exits 2 with one line, `error: …`, for bad input."""
    parser = argparse.ArgumentParser(description=f"Train one stage of a recipe ({phase}).")
    parser.add_argument("--recipe", required=True, help="recipe file, packaged name, or run directory")
    parser.add_argument("--stage", required=True, type=int, help="1 is the first task")
    parser.add_argument("--run-dir", type=Path, help="default: runs/<the recipe's name>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    options = parser.parse_args()
    # Python put the script's folder first, whose packages would hide a user's modules of the same names.
    scripts = Path(__file__).resolve().parents[1]
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != scripts]
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
            run_stage(recipe, options.stage, options.run_dir or here, phase, make_trainer)
    except Preempted as stop:
        print(stop, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)
    except InputError as error:
        # Every process says it: the launcher kills the others when the first one ends. A worker of the data loader
        # wraps its own in a traceback.
        print(f"error: {str(error).rpartition('InputError: ')[2]}", file=sys.stderr, flush=True)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = f"Lower train.{phase}.args.per_device_train_batch_size: the global batch stays what it is"
        print(f"error: {str(error).splitlines()[0]} {remedy}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:
        print(f"error: {not_written(error, options.run_dir or options.recipe)}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_stage(recipe: Recipe, k: int, run_dir: Path, phase: Phase, make_trainer: MakeTrainer) -> None:
    """Train stage `k` and write `RUN/stages/<kk>-<name>/`; every process of a launch calls it.

    Needs the prepared data in `RUN/data/` and the stage before, as `serving.json` in its folder (stage 0: the base).
    Of a stage of two phases the first writes `Stage.half_folder`, with which the second begins. Goes on from the last
    checkpoint, if there is one. Raises `InputError`, and `Preempted` after a checkpoint when the process was asked to
    stop.
    """
    if not 1 <= k <= len(recipe.stages):
        raise InputError(
            f"the stream has stages 1 to {len(recipe.stages)}, not {k}", where=recipe.name, field="--stage"
        )
    stage, stages = recipe.stages[k - 1], run_dir / "stages"
    phases, last = stage.train.phases, phase == stage.train.phases[-1]
    _check(recipe, stage, phase)
    before = stages / (recipe.stages[k - 2].folder if k > 1 else "00-base")
    inputs = stage_inputs(recipe, stage, run_dir, entering_hashes(before))
    whole = Workplace(stages / stage.folder, hash_json(inputs))
    first = Workplace(stages / stage.half_folder, hash_json({**inputs, "phase": phases[0]}))
    work = whole if last else first
    with contextlib.ExitStack() as stack:
        if is_first_process():
            lock = run_dir / "steps" / f"stage-{k}.lock"  # for whoever starts a stage by hand; runs lock the step
            stack.enter_context(locked(lock, f"stage {k} of {run_dir}"))
        if whole.is_done() or work.is_done():
            print(f"stage {k} is done: {work.stage_dir}", flush=True)
        elif phase != phases[0] and not first.is_done():
            remedy = f"Start pipeline/{phases[0]}.py"
            raise InputError(f"stage {k} has no {phases[0]} yet", where=first.stage_dir, remedy=remedy)
        else:
            half = first.stage_dir if phase != phases[0] else None
            _train(enter_stage(recipe, stage, phase, run_dir, before, half, work.folder), work, run_dir, make_trainer)
        if is_first_process():
            work.remove()
            if last:
                shutil.rmtree(first.stage_dir, ignore_errors=True)


def _check(recipe: Recipe, stage: Stage, phase: Phase) -> None:
    """What can be refused at once. Raises `InputError`."""
    check_stage(stage)
    if phase not in stage.train.phases:
        raise InputError(
            f"stage {stage.k} is {stage.train.paradigm}, and this is pipeline/{phase}.py",
            where=recipe.name,
            field="train.paradigm",
            remedy=f"Start pipeline/{stage.train.phases[0]}.py",
        )
    if len(stage.train.phases) > 1 and recipe.eval.during:
        raise InputError(f"does not look into {stage.train.paradigm}", where=recipe.name, field="eval.during")


def _train(entered: Entered, work: Workplace, run_dir: Path, make_trainer: MakeTrainer) -> None:
    """Train what was entered, and write what comes of it."""
    start, recipe, stage, tuned = time.monotonic(), entered.recipe, entered.stage, entered.model
    set_environment(recipe.name, stage.folder, run_dir, work.fingerprint)
    trainer: Any = make_trainer(entered)
    trainer.take_on(entered, entered.methods, idle_parameters(tuned, sparse=entered.carrier is not None))
    trainer.mode = _mode(trainer)
    check_mode(recipe, stage, entered.methods, trainer.mode)
    if trainer.mode == "zero3":
        keep_whole(trainer, list(trained_parameters(tuned).values()))
    trainer.add_callback(ReallyDistributed(trainer))
    trainer.add_callback(untrained := Untrained(tuned))
    trainer.checkpoints = work.checkpoints
    if trainer.accelerator.is_main_process:
        work.claim()
    trainer.accelerator.wait_for_everyone()
    checkpoint = trainer.last_checkpoint(notes := list[str]())
    trainer.add_callback(live := Live(work.folder, start))
    during = _during(entered, trainer, run_dir) if recipe.eval.during else None
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
        _check_trained(stage, entered.phase, untrained.fingerprint, fingerprint(tuned))
        last = entered.phase == stage.train.phases[-1]
        size = sum(one.numel() for one in trained_parameters(tuned).values())
        save = what_to_save(entered, last)
        states = {
            method.name: method.finish(tuned, entered.samples) if last else method.hand_over()
            for method in entered.methods
        }
        seconds = live.seconds
        cost = stage_cost(trainer, seconds, live.processor_seconds, stage.train.batch_size(entered.phase))
        if trainer.accelerator.is_main_process:
            told = {"seconds": seconds, "trained_parameters": size, "cost": cost, "notes": notes}
            _write(entered, work, trainer, save, states, told, during)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


def _write(
    entered: Entered,
    work: Workplace,
    trainer: Any,
    save: Save,
    states: States,
    told: dict[str, Any],
    during: During | None,
) -> None:
    """Write the folder of a stage, or of its first phase; `told` is for `trained.json` beside what is found here."""
    stage, half, output = entered.stage, entered.entry.half, work.finished
    served = save(states, output)
    for name, state in states.items():
        save_state(output, name, state)
    log = read_jsonl(half / "train_log.jsonl") if half else []
    write_jsonl(output / "train_log.jsonl", [*log, *map(finite, trainer.state.log_history)])
    summary = {
        "fingerprint": work.fingerprint,
        "steps": trainer.state.global_step,
        "samples": len(entered.samples),
        "processes": trainer.accelerator.num_processes,
        "mode": trainer.mode,
        **told,
        **trainer.report(),
    }
    if half:
        before = summary[stage.train.phases[0]] = read_json(half / "trained.json")
        summary["cost"] = both(before["cost"], summary["cost"])
        summary["seconds"] += before["seconds"]
    if during:
        during.write(output)
        summary["during"] = during.summary()
    if entered.phase == stage.train.phases[-1]:
        changes = {"stage": stage.k, "name": stage.name, **served}
        write_serving(output, entered.before.model_copy(update=changes))
    write_json(output / "trained.json", summary)
    replace_folder(output, work.stage_dir)


def _check_trained(stage: Stage, phase: Phase, before: dict[str, float], after: dict[str, float]) -> None:
    """Training has moved weights, and to where numbers are. Raises `InputError`."""
    where, field = f"stage {stage.name}", f"train.{phase}.args"
    if not all(math.isfinite(value) for value in after.values()):
        raise InputError("training ended with weights that are not finite", where=where, field=field, remedy=LOWER)
    if before == after:
        remedy = "Look at the learning rate, the number of steps and the rewards"
        raise InputError("training changed no weight", where=where, field=field, remedy=remedy)


def _during(entered: Entered, trainer: "Trainer", run_dir: Path) -> During:
    """What is asked while the stage trains: every task learned by its end, in the order of the matrix's columns."""
    recipe, config = entered.recipe, entered.recipe.eval.during
    assert config is not None
    folders = {task: run_dir / "data" / task for task, first in recipe.learned.items() if first <= entered.stage.k}
    tasks = {task: read_task(folder) for task, folder in folders.items()}
    probes = {task: choose_probes(samples_of(folders[task], tasks[task], "test"), config.probes) for task in tasks}
    collator = Collator(entered.processor, [], entered.context, padding_side="left")
    return During(trainer, config, tasks, probes, collator)


def _mode(trainer: "Trainer") -> str:
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None:
        return f"zero{max(plugin.zero_stage, 2)}"
    return "ddp" if trainer.accelerator.num_processes > 1 else "single"
