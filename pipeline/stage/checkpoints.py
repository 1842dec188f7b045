"""Checkpoints of a stage in training: folders that are whole or absent, verified when they are read, the last two kept.

`<folder>/<step>/manifest.json` says which files belong to it, with their sizes and hashes, and whose it is. A
checkpoint is written beside its place and renamed once everything is on the disk, so that neither a kill nor a power
cut leaves half of one; what a disk has spoilt since does not match its manifest.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

from mcit.data_prep.files import read_json, write_json

MANIFEST = "manifest.json"
KEPT = 2  # the last, and one more in case that is torn


class File(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """`manifest.json`."""

    step: int
    mode: str  # how the processes that wrote it shared the model out
    processes: int
    files: dict[str, File]


class Checkpoints:
    """The checkpoints below one folder. Processes that train together share it: all of them fill, the first commits."""

    def __init__(self, folder: Path):
        self.folder = folder

    def place(self, step: int) -> Path:
        """Where the files of a new checkpoint are written, by all processes."""
        return self.folder / f".{step:08d}.writing"

    def clear(self) -> None:
        """Remove what a process that was killed was writing; the first process calls it before any writes."""
        for path in self.folder.glob(".*.writing"):
            shutil.rmtree(path)

    def commit(self, step: int, mode: str, processes: int) -> Path:
        """Make what is at `place(step)` a checkpoint, and remove older ones; the first process calls it."""
        writing, folder = self.place(step), self.folder / f"{step:08d}"
        files = {
            str(path.relative_to(writing)): _settled(path) for path in sorted(writing.rglob("*")) if path.is_file()
        }
        manifest = Manifest(step=step, mode=mode, processes=processes, files=files)
        write_json(writing / MANIFEST, manifest)
        for path in (*filter(Path.is_dir, writing.rglob("*")), writing):
            _sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, but torn
        writing.rename(folder)
        _sync(self.folder)
        for old in sorted(self._all(), reverse=True)[KEPT:]:
            shutil.rmtree(old)
        return folder

    def newest(self, unfit: Callable[[Manifest], str | None], warn: Callable[[str], None]) -> Path | None:
        """The last checkpoint that is whole and fits; `unfit` says why one does not. Others are named to `warn`."""
        for folder in sorted(self._all(), reverse=True):
            problem = torn(folder) or unfit(read_json(folder / MANIFEST))
            if problem is None:
                return folder
            warn(f"{folder}: the checkpoint is not used: {problem}")
        return None

    def _all(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("[0-9]*") if path.is_dir())


def torn(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, if anything is."""
    try:
        manifest: Any = read_json(folder / MANIFEST)
        for name, file in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != file["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes of {file['bytes']}"
            if _hash(folder / name) != file["sha256"]:
                return f"{name} is not what was written"
    except Exception as error:  # whatever a torn manifest may raise
        return f"{MANIFEST} cannot be read: {error}"
    return None


def _settled(path: Path) -> File:
    """What a manifest says of a file, which is on the disk by then."""
    _sync(path)
    return File(bytes=path.stat().st_size, sha256=_hash(path))


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
