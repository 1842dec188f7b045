"""A JSON list read item by item: a file of any size costs the memory of its largest item.

Python's own parser reads the items, so that values and error messages are those of `json.load` (ijson's parser takes no
NaN, and does not say where a file is broken).
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from .errors import InputError

_CHUNK = 1 << 20  # bytes
_LONGEST_TOKEN = 16  # characters of a literal, a number's tail or an escape that a chunk's end can cut in two


def iter_json_list(path: Path) -> Iterator[Any]:
    """Yield the items of a file that holds one JSON list. Raises `InputError` where it breaks, after what is before."""
    with open(path, "rb") as file:
        text = _Text(file, path)
        text.take("[")
        following = text.peek()
        while following != "]":
            yield text.value()
            following = text.peek()
            if following != "]":
                text.take(",")
                if text.peek() == "]":
                    text.fail("Expecting value")
        text.take("]")
        if text.peek():
            text.fail("Extra data")


class _Text:
    """The part of a file's text that is being read: `text[at:]` is to come, and more behind it unless `ended`."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.ended = "", 0, False
        self.lines, self.column = 0, 0  # complete lines, and characters of the line after them, that were let go

    def peek(self) -> str:
        """The next character that is no white space, or nothing at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def take(self, character: str) -> None:
        """Go past a character that must come now."""
        if self.peek() != character:
            self.fail(f"Expecting {character!r} delimiter")
        self.at += 1

    def value(self) -> Any:
        """The value that comes now."""
        self.peek()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith("Unterminated string")
                if self.ended or not (open_string or error.pos > len(self.text) - _LONGEST_TOKEN):
                    self.fail(error.msg, error.pos)
            except (RecursionError, ValueError) as error:
                self.fail(str(error))
            else:
                closed = self.text[end - 1] in '"]}'
                if closed or self.ended or end + _LONGEST_TOKEN <= len(self.text):  # else a number may go on
                    self.at = end
                    return value
            self.more()

    def more(self) -> None:
        """Let go of what was read and read on, twice as far as what is left: a long item is not tried too often."""
        gone = self.text[: self.at]
        if "\n" in gone:
            self.lines += gone.count("\n")
            self.column = len(gone) - gone.rindex("\n") - 1
        else:
            self.column += len(gone)
        rest = self.text[self.at :]
        data = self.file.read(max(_CHUNK, len(rest)))
        self.ended = not data
        pending = len(self.decode.getstate()[0])
        try:
            self.text, self.at = rest + self.decode.decode(data, final=self.ended), 0
        except UnicodeDecodeError as error:
            byte = self.file.tell() - len(data) - pending + error.start
            raise InputError(f"is not UTF-8 (byte {byte})", where=self.path, remedy="Save it as UTF-8") from None

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """The file breaks here."""
        before = self.text[: self.at if at is None else at]
        line = self.lines + before.count("\n") + 1
        column = len(before) - before.rindex("\n") if "\n" in before else self.column + len(before) + 1
        raise InputError(
            f"malformed JSON: {problem}",
            where=f"{self.path}:{line}:{column}",
            remedy="The file may be half-written: fetch it again",
        )
