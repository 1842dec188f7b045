"""The folder in which a stage works until it is done: what is in it outlives a kill, and serves the same stage only."""

import os
import shutil
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json

from .checkpoints import Checkpoints

LIVE = "live.json"


class Progress(TypedDict):
    """`live.json`: how far the stage is."""

    step: int
    steps: int
    loss: float | None
    seconds: float  # of all attempts so far
    processor_seconds: float  # of this process's threads in all attempts
    left: float | None  # seconds, if it goes on as since it was started


def work_folder(stage_dir: Path) -> Path:
    """Where the stage of `stage_dir` works."""
    return stage_dir.with_name(f".{stage_dir.name}.partial")


class Workplace:
    """`RUN/stages/.<kk>-<name>.partial/`, for a stage with this fingerprint.

    Methods keep there what they make before the first step (`Entered.output_dir`). `finished` is the stage's folder
    while it is being written.
    """

    def __init__(self, stage_dir: Path, fingerprint: str):
        self.stage_dir, self.fingerprint = stage_dir, fingerprint
        self.folder = work_folder(stage_dir)
        self.finished = self.folder / "finished"
        self.checkpoints = Checkpoints(self.folder / "checkpoints")

    def is_done(self) -> bool:
        """Whether the stage's folder is there: whoever started it may have been killed before noting that."""
        return self._belongs(self.stage_dir / "trained.json")

    def claim(self) -> None:
        """Make the folder, or keep it if it is this stage's; one process calls it, before any works there."""
        mark = self.folder / "stage.json"
        if not self._belongs(mark):
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(mark, {"fingerprint": self.fingerprint})
        shutil.rmtree(self.finished, ignore_errors=True)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _belongs(self, file: Path) -> bool:
        try:
            return bool(read_json(file).get("fingerprint") == self.fingerprint)
        except (InputError, AttributeError):  # absent, or torn
            return False


def read_progress(folder: Path) -> Progress | None:
    """How far the stage is that works in `folder`."""
    try:
        progress: Progress = read_json(folder / LIVE)
        return progress
    except InputError:  # absent
        return None


def is_first_process() -> bool:
    """Whether this is the first of the processes that the launcher started on any node."""
    return os.environ.get("RANK", "0") == "0"
