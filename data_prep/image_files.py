"""Many image files: each has a number, and all are looked at on all cores, whatever a decoder does to its process."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from .errors import InputError
from .images import ImageFacts, inspect_image, read_image, unreadable

Fact = TypeVar("Fact")
_WORTH_A_PROCESS = 1000  # images; a process takes a third of a second to start
_AT_ONCE, _CHUNK = 4096, 32  # images in the queue of all processes, and given to one at a time


class ImageFiles:
    """Image files by number, in the order in which they were first named."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, path: str) -> int:
        """The number of a file, a new one for a path that is new."""
        number = self._numbers.setdefault(path, len(self.paths))
        if number == len(self.paths):
            self.paths.append(path)
        return number

    def inspect(self, numbers: Iterable[int], *, decode: bool = True) -> dict[int, ImageFacts | InputError]:
        """Identity and size of each of these; what is wrong with one is a value.

        Without `decode` only the bytes are hashed, and width and height are 0.
        """
        unique = sorted(set(numbers))
        paths = [self.paths[number] for number in unique]
        return dict(zip(unique, map_images(_facts if decode else _identity, paths), strict=True))


def map_images(look: Callable[[Path], Fact | InputError], paths: Sequence[str | Path]) -> Iterator[Fact | InputError]:
    """`look` at each file, in order, on all cores: in threads, or of many files in processes.

    Decoding leaves Python's lock, so threads do for large images; of small ones most time is spent around it, and these
    come in large numbers. `look` is a function of a module, for processes to find it. A file that kills the process
    which looks at it (a decoder that crashes, or takes all memory) is an error like any other.
    """
    pool, chunk = _pool(len(paths))
    try:
        for start in range(0, len(paths), _AT_ONCE):
            some, done = [Path(path) for path in paths[start : start + _AT_ONCE]], 0
            try:
                for fact in pool.map(look, some, chunksize=chunk):
                    done += 1
                    yield fact
            except BrokenProcessPool:
                yield from _one_by_one(look, some[done:])
                pool, _ = _pool(len(paths))
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(look: Callable[[Path], Fact | InputError], paths: Iterable[Path]) -> Iterator[Fact | InputError]:
    """`look` at each file in a process that may die of it: then it is known which file that was."""
    pool = _process()
    try:
        for path in paths:
            try:
                yield pool.submit(look, path).result()
            except BrokenProcessPool:
                pool = _process()
                yield unreadable(path, RuntimeError("it kills the process that tries to"))
    finally:
        pool.shutdown()


def _pool(images: int) -> tuple[Executor, int]:
    """What to look at so many images with, and how many to give it at a time."""
    workers = min(os.cpu_count() or 1, images // _WORTH_A_PROCESS)
    if workers < 2:
        return ThreadPoolExecutor(os.cpu_count()), 1
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn")), _CHUNK


def _process() -> Executor:
    """One process. Raises `BrokenProcessPool` where none can be started, which is no image's fault."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    pool.submit(os.getpid).result()
    return pool


def _facts(path: Path) -> ImageFacts | InputError:
    try:
        return inspect_image(path)
    except InputError as error:
        return error


def _identity(path: Path) -> ImageFacts | InputError:
    try:
        return ImageFacts(hashlib.sha256(read_image(path)).hexdigest(), 0, 0)
    except InputError as error:
        return error
