"""Evaluation beside training: a stage answers while the next ones train, on what training leaves free."""

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import IO

from mcit.data_prep.errors import InputError

from ..recipe.loading import write_recipe
from .child import Child, lines, spawn, watched
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
    if beside is None:
        perform_steps(run, run.steps(), terminal)
        return
    env = _environment(beside, run.launch)
    perform_steps(run, run.preparation(), terminal)
    with _follower(run, env) as follower:
        for step in run.training():
            perform_steps(run, [step], terminal)
            follower.tell(terminal)
        with terminal.working("evaluate what has been trained") as show:
            follower.wait(show)
        follower.tell(terminal)
    perform_steps(run, [run.evaluate(), *run.judging(), *run.reporting(), *run.publication()], terminal)


def follow(run: Run, terminal: Terminal) -> None:
    """Evaluate each stage once it is trained, by whomever, until all are. Raises `InputError` and `ChildFailed`."""
    for k in run.rows():
        step = run.evaluate(row=k)
        with terminal.working(f"stage {k} is not trained yet"):
            while step.inputs() is None:
                time.sleep(_PAUSE)
        perform_steps(run, [step], terminal)


class _Follower:
    """`mcit eval --follow` at work, its log being written."""

    def __init__(self, child: Child, log: IO[bytes]):
        assert child.stdout is not None
        self.child, self.said, self.told = child, deque[str](maxlen=1), False
        self.reader = threading.Thread(target=self.said.extend, args=(lines(child.stdout, log),), daemon=True)
        self.reader.start()

    def tell(self, terminal: Terminal) -> None:
        """Say so, once, if it has failed."""
        if self.child.poll() and not self.told:
            self.reader.join()
            problem, self.told = "".join(self.said).removeprefix("error: "), True
            terminal.say(f"evaluation beside training has stopped: {problem}", "yellow")

    def wait(self, show: Show) -> None:
        """Until it has ended, showing what it says."""
        while self.child.poll() is None:
            show("".join(self.said))
            time.sleep(0.2)
        self.reader.join()


@contextlib.contextmanager
def _follower(run: Run, env: Mapping[str, str]) -> Iterator[_Follower]:
    """A process of its own that follows the run, and does not outlive the block."""
    settled = run.dir / "steps" / "evaluate-beside.yaml"  # RUN/recipe.yaml may be another's by now
    write_recipe(run.recipe, settled)
    command = [sys.executable, "-P", "-m", "mcit.pipeline.cli", "eval", str(settled), "--run-dir", str(run.dir)]
    log = run.dir / "logs" / "evaluate-beside.log"
    log.parent.mkdir(exist_ok=True)
    begin = partial(spawn, [*command, "--follow"], env, ())
    with open(log, "wb") as file, watched(begin, file, launcher=False) as child:
        yield _Follower(child, file)


def _environment(beside: str, launch: Launch) -> dict[str, str]:
    """What an evaluation's process is given to see `beside`: GPUs by number, `2` or `2,3`, or `cpu` without a GPU.

    Raises `InputError` where they are not there, or training has them.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = [str(number) for number in range(len(gpus()))]
    if visible is not None:
        known = [one for one in visible.split(",") if one not in ("", "-1")]
    if beside == CORES and not known:
        return dict(os.environ)
    free, numbers = range(launch.processes, len(known)), beside.split(",")
    if len({*numbers}) < len(numbers) or not all(one.isdecimal() and int(one) in free for one in numbers):
        remedy = f"Free are {', '.join(map(str, free))}" if free else "Train on fewer (--gpus)"
        if not known:
            remedy = f"Without a GPU: {CORES}"
        raise InputError("not a GPU that training leaves free", where=f"--evaluate-on {beside}", remedy=remedy)
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(known[int(one)] for one in numbers)}
