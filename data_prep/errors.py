"""The one error a user can cause: bad input, reported in one line, exit code 2."""

import errno
import os
import re

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_ROOM = "Make room and run it again: what is done is kept"
_LONGEST = 1000  # characters of a part of an error


class InputError(Exception):
    """Bad input from outside: a file, a field in it, what is wrong, and what to do about it.

    The command line prints `str(error)` on one line and exits with code 2. Raise it as early as possible, before
    anything is written. `where` names the file (and line), `field` the key or sample; either may be empty. The parts
    are kept as attributes, for reports that list many.
    """

    def __init__(self, problem: str, *, where: object = "", field: str = "", remedy: str = ""):
        self.problem, self.where = _short(problem), _short(str(where))
        self.field, self.remedy = _short(field), _short(remedy)
        place = ": ".join(part for part in (self.where, self.field) if part)
        line = f"{place}: {self.problem}" if place else self.problem
        super().__init__(" ".join(f"{line}. {self.remedy}".split()) if remedy else " ".join(line.split()))


def not_written(error: Exception, where: object = "") -> InputError:
    """The line for what a disk refuses: no room, a quota, a limit on a file's size, a place that may not be used.

    Any other `error` is raised again. `where` says what was being written to, where the error does not.
    """
    code = _number(error)
    if code not in _FULL + _CLOSED:
        raise error
    remedy = _ROOM if code in _FULL else "Look at its permissions, or name another place"
    return InputError(os.strerror(code), where=getattr(error, "filename", None) or where, remedy=remedy)


def _number(error: Exception) -> int:
    """The operating system's number of an error, 0 where it has none; safetensors and torch say it in words alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    broken = isinstance(error, RuntimeError) and re.search("unexpected pos|file write failed", str(error))
    return int(found[1]) if found else errno.ENOSPC if broken else 0


def _short(text: str) -> str:
    """A text that can be printed: data can put megabytes into it."""
    return printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def printable(text: str) -> str:
    """A text that can be written as UTF-8: lone surrogates, from data or names of files, as `\\udc…`."""
    return text.encode(errors="backslashreplace").decode()
