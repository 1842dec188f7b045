"""A run's directory: where its stages, markers, locks and logs are, and how one of its steps is done in it."""

import contextlib
import os
import time
from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, write_json

from ..recipe.schema import Recipe
from .child import run_child
from .forks import SCRIPT, fork_server
from .locks import locked
from .step import Facts, Launch, Show, Step


class RunDirectory:
    """A recipe, the directory of its run, and how its processes are started."""

    def __init__(self, recipe: Recipe, directory: Path, launch: Launch):
        self.recipe, self.dir, self.launch = recipe, directory, launch

    def perform(self, step: Step, show: Show) -> tuple[Facts, bool]:
        """Do a step under its lock unless it is done; returns its marker and whether there was anything to do."""
        if not step.again and (marker := step.done()):
            return marker, False
        with self._locked(step) as lock:
            before = step.done()
            if before and not step.again:  # another process did it meanwhile
                return before, False
            inputs = step.inputs()
            if inputs is None:
                raise InputError(f"{step.title}: a step before it is not done", where=self.dir, remedy="Use `mcit run`")
            start = time.monotonic()
            facts = step.work(show, lock)
            if before and facts.items() <= before.items():
                return before, False
            seconds = round(time.monotonic() - start, 3)
            marker = {"fingerprint": hash_json(inputs), "seconds": seconds, **facts, "inputs": inputs}
            write_json(step.marker, marker)
            return marker, True

    def lock(self, step: Step) -> Path:
        """The lock of a step."""
        return self.dir / "steps" / f"{step.file_name}.lock"

    def stage_dir(self, k: int) -> Path:
        """The folder of stage `k`; 0 is the base."""
        return self.dir / "stages" / (self.recipe.stages[k - 1].folder if k else "00-base")

    def _marker(self, name: str) -> Path:
        return self.dir / "steps" / f"{name}.json"

    def _locked(self, step: Step) -> contextlib.AbstractContextManager[int]:
        return locked(self.lock(step), f"{step.title} of {self.dir}")

    def _child(
        self,
        name: str,
        python: list[str],
        command: list[str],
        modules: tuple[str, ...],
        show: Show,
        *locks: int,
        launcher: bool = False,
    ) -> None:
        """Run a child process of a step, with its log in RUN/logs/: `command`, by the command line `python`.

        Where children are forked, it is from a process that has imported `modules`.
        """
        # PASSIVE: threads that spin while they wait take the cores from whatever else runs, from each other too.
        # MALLOC…, for glibc: memory that every step on a CPU needs anew is kept, not given back and faulted in again.
        # PYTHONWARNINGS: what a library will change one day would stand where a step says what it is at.
        usual = {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }
        usual |= {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
        if self.launch.forks:
            usual["DS_ACCELERATOR"] = "cpu"  # DeepSpeed asks when it is imported; a stage sets it too late for that
        env, log = usual | os.environ | {"TOKENIZERS_PARALLELISM": "false"}, self.dir / "logs" / f"{name}.log"
        if self.launch.forks:
            start = fork_server([*python, str(SCRIPT), *modules], env).start
            run_child(command, log, env, show, *locks, launcher=launcher, start=start)
        else:
            run_child([*python, *command], log, env, show, *locks, launcher=launcher)
