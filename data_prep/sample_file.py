"""A part of a prepared task as a sequence that lies on disk."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

from .schema import Sample


class SampleFile:
    """The samples of a JSONL file, each read when it is asked for; in memory is where they begin."""

    def __init__(self, path: Path):
        self._file = open(path, "rb")
        self._starts, start = array("q"), 0
        for line in self._file:
            self._starts.append(start)
            start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        self._file.seek(self._starts[index])
        sample: Sample = json.loads(self._file.readline())
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))
