"""Samples on disk while a task is read: however many there are, none stays in memory."""

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO

from .errors import InputError, printable
from .readers import Part
from .schema import Sample


@dataclass
class Record:
    """A sample of a spool: its place there, its image files by number, and `where` it was read."""

    offset: int
    part: Part
    where: str
    images: list[int]
    text: bytes  # of the sample, as JSON

    @cached_property
    def sample(self) -> Sample:
        """The sample, parsed when it is asked for: much is decided without."""
        sample: Sample = json.loads(self.text)
        return sample


class Spool:
    """A file of samples, one a line, in the order in which they were added."""

    def __init__(self, path: Path):
        self.path = path
        self._file: IO[bytes] = open(path, "wb")
        self._end = 0

    def add(self, part: Part, where: str, images: list[int], sample: Sample) -> Record:
        """Write one more. Raises `InputError` for what cannot be written as JSON."""
        try:
            text = json.dumps(sample, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"cannot be written as JSON ({error})", where=where) from None
        where = printable(where)
        record = Record(self._end, part, where, images, text)
        record.sample = sample
        line = b"%b\t%b\n" % (json.dumps([part, where, images]).encode(), text)  # JSON holds no bare tab
        self._file.write(line)
        self._end += len(line)
        return record

    def __iter__(self) -> Iterator[Record]:
        """All samples, in order."""
        self._file.flush()
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                yield _record(offset, line)
                offset += len(line)

    def at(self, offsets: Iterable[int]) -> Iterator[Record]:
        """The samples at these places."""
        self._file.flush()
        with open(self.path, "rb") as file:
            for offset in offsets:
                file.seek(offset)
                yield _record(offset, file.readline())

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self.path.unlink()


def offsets_of(records: Iterable[Record]) -> "array[int]":
    """The places of samples, eight bytes each."""
    return array("q", (record.offset for record in records))


def _record(offset: int, line: bytes) -> Record:
    head, _, text = line.partition(b"\t")
    part, where, images = json.loads(head)
    return Record(offset, part, where, images, text)
