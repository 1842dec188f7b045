"""One process a step: a lock that also outlives its holder as long as the holder's child is still at work."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TypedDict

from mcit.data_prep.errors import InputError

from .preemption import PATIENCE


class Owner(TypedDict):
    """Who holds, or last held, a lock."""

    pid: int
    host: str
    since: str


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[int]:
    """Hold the lock at `path` and yield its file descriptor.

    A child that inherits the descriptor holds the lock too, so what a killed run left behind keeps others away until it
    has stopped, and is waited for. Raises `InputError` that names the other process while that is alive.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        patient, orphaned = time.monotonic() + 0.5, time.monotonic() + PATIENCE + 30
        while not _try(file, fcntl.LOCK_EX):
            owner = _owner(file)
            if time.monotonic() > (orphaned if owner and _is_gone(owner) else patient):
                by = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
                raise InputError(f"{what} is being done by {by}", where=path, remedy="Wait for it or stop it first")
            time.sleep(0.1)
        file.seek(0)
        file.truncate()
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        json.dump(Owner(pid=os.getpid(), host=socket.gethostname(), since=now), file)
        file.flush()
        yield file.fileno()


def holder(path: Path) -> Owner | None:
    """Who holds the lock at `path` at this moment."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as file:
        return None if _try(file, fcntl.LOCK_SH) else _owner(file)


def _try(file: IO[str], kind: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _owner(file: IO[str]) -> Owner | None:
    file.seek(0)
    with contextlib.suppress(json.JSONDecodeError):
        return json.load(file)
    return None


def _is_gone(owner: Owner) -> bool:
    """Whether the process itself has ended; on another host nobody can tell."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
