"""Evaluation beside training: a stage answers while the next ones train, on what training leaves free."""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from mcit.data_prep.errors import InputError

from .child import lines, spawn, watched
from .doctor import gpus
from .runner import perform_steps
from .step import Launch, Show
from .steps import Run
from .terminal import Terminal

CORES = "cpu"  # in the place of GPUs
_PAUSE = 2.0  # seconds between looks at a stage that is not trained yet


def perform_run(run: Run, terminal: Terminal, beside: str | None = None) -> None:
    """Do all steps of a run; `beside` names what evaluates each stage while the next ones train (`_environment`).

    Raises `InputError` and `ChildFailed`; what was done stays done.
    """
    if beside is not None:
        env = _environment(beside, run.launch)
        perform_steps(run, run.preparation(), terminal)
        with _follower(run, env) as ended:
            perform_steps(run, run.training(), terminal)
            with terminal.working("evaluate what has been trained") as show:
                problem = ended(show)
        if problem:
            terminal.say(f"evaluation beside training has stopped: {problem}", "yellow")
    perform_steps(run, run.steps(), terminal)


def follow(run: Run, terminal: Terminal) -> None:
    """Evaluate each stage once it is trained, by whomever, until all are. Raises `InputError` and `ChildFailed`."""
    for k in run.rows():
        step = run.evaluate(row=k)
        with terminal.working(f"stage {k} is not trained yet"):
            while step.inputs() is None:
                time.sleep(_PAUSE)
        perform_steps(run, [step], terminal)


@contextlib.contextmanager
def _follower(run: Run, env: Mapping[str, str]) -> Iterator[Callable[[Show], str]]:
    """`mcit eval --follow` in a process of its own, which does not outlive the block.

    Yields what waits until it has ended, showing what it says, and tells what it ended with if that was an error.
    """
    command = [sys.executable, "-P", "-m", "mcit.pipeline.cli", "eval", str(run.dir), "--follow"]
    log, said = run.dir / "logs" / "evaluate-beside.log", deque[str](maxlen=1)
    log.parent.mkdir(exist_ok=True)
    with open(log, "wb") as file, watched(partial(spawn, command, env, ()), file, launcher=False) as child:
        assert child.stdout is not None
        reader = threading.Thread(target=said.extend, args=(lines(child.stdout, file),), daemon=True)
        reader.start()

        def ended(show: Show) -> str:
            while child.poll() is None:
                show("".join(said))
                time.sleep(0.2)
            reader.join()
            return "".join(said).removeprefix("error: ") if child.wait() else ""

        yield ended


def _environment(beside: str, launch: Launch) -> dict[str, str]:
    """What an evaluation's process is given to see `beside`: GPUs by number, `2` or `2,3`, or `cpu` without a GPU.

    Raises `InputError` where they are not there, or training has them.
    """
    there = os.environ["CUDA_VISIBLE_DEVICES"].split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else None
    known = there or [str(number) for number in range(len(gpus()))]
    free = known[launch.processes // launch.nodes :]
    if beside == CORES and not gpus():
        return dict(os.environ)
    chosen = [known[int(one)] for one in beside.split(",") if one.isdecimal() and int(one) < len(known)]
    if len(chosen) != len(beside.split(",")) or not {*chosen} <= {*free}:
        numbers = ", ".join(str(known.index(one)) for one in free)
        remedy = f"Free are {numbers}" if free else "Train on fewer (--gpus)" if known else f"Without a GPU: {CORES}"
        raise InputError("not a GPU that training leaves free", where=f"--evaluate-on {beside}", remedy=remedy)
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(chosen)}
