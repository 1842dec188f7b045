"""Child processes that leave a log, show where they are, and never outlive the run that started them."""

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from mcit.data_prep.errors import InputError

from .preemption import deaf_children
from .redaction import redact

# Reads the child's process group, then waits for a second line that says the child has ended. If this process dies
# first, by whatever signal, the pipe closes instead: the group is asked to stop, and killed if it does not.
_WATCHDOG = 'read group; read ended || { kill -s TERM -- "-$group"; sleep 30; kill -s KILL -- "-$group"; }'
_EXIT_2 = re.compile(r"exit status 2\b|exitcode\s*: 2\b")  # what accelerate and torch say of a process that exits 2
_LINE_END = re.compile(rb"[\r\n]+")


class ChildFailed(Exception):
    """A child process ended with an error that is not the user's; the text holds its last lines and the log's path."""


def run_child(
    command: Sequence[str], log: Path, env: Mapping[str, str], show: Callable[[str], None], *keep_open: int
) -> None:
    """Run `command` with its output in `log`, calling `show` with each line it prints (progress bars included).

    The child inherits the file descriptors `keep_open`, the step's locks, so that the step stays locked until the child
    too is gone. Raises `InputError` with the child's own line if it refused its input, otherwise `ChildFailed`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=100)
    refused = None
    with open(log, "wb") as file, _watched(command, env, file, keep_open) as child:
        assert child.stdout is not None
        for line in _lines(child.stdout, file):
            last.append(line)
            refused = line.removeprefix("error: ") if line.startswith("error: ") else refused
            show(line.strip())
        code = child.wait()
    if code:
        if refused and (code == 2 or any(map(_EXIT_2.search, last))):
            raise InputError(refused)
        raise ChildFailed("\n".join([*_without_launcher(list(last))[-15:], f"exit code {code}; the whole log: {log}"]))


@contextlib.contextmanager
def _watched(
    command: Sequence[str], env: Mapping[str, str], log: IO[bytes], keep_open: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """The child in a process group of its own, stopped when the block is left by an error or this process dies."""
    with deaf_children():
        watchdog = subprocess.Popen(
            ["sh", "-c", _WATCHDOG],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        child = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=keep_open,
        )
        assert watchdog.stdin is not None
        watchdog.stdin.write(f"{child.pid}\n".encode())
        watchdog.stdin.flush()
    try:
        yield child
    finally:
        if child.poll() is None:
            _stop(child, log)
        with contextlib.suppress(BrokenPipeError):
            watchdog.stdin.write(b"ended\n")
            watchdog.stdin.close()
        watchdog.wait()


def _stop(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Ask the child's group to stop, and kill it if it does not within 30 seconds. What it still says is logged."""
    assert child.stdout is not None
    rest = threading.Thread(target=deque, args=(_lines(child.stdout, log), 0), daemon=True)
    rest.start()
    for sign, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            rest.join(1.0)  # a grandchild may keep the pipe open
            return


def _without_launcher(lines: list[str]) -> list[str]:
    """The lines without the traceback in which the launcher only says that its script has failed."""
    starts = [place for place, line in enumerate(lines) if line.startswith("Traceback ")]
    of_launcher = starts and any("accelerate/commands/launch.py" in line for line in lines[starts[-1] :])
    return lines[: starts[-1]] if of_launcher else lines


def _lines(stream: IO[bytes], log: IO[bytes]) -> Iterator[str]:
    """The non-empty lines of `stream`, carriage returns counting as line ends; everything also goes to `log`.

    Secrets go nowhere.
    """
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        whole = rest + chunk
        end = max(whole.rfind(b"\n"), whole.rfind(b"\r")) + 1
        rest = whole[end:]
        yield from _logged(whole[:end], log)
    yield from _logged(rest, log)


def _logged(data: bytes, log: IO[bytes]) -> Iterator[str]:
    """Write whole lines to `log`, and give them."""
    text = data.decode(errors="surrogateescape")
    if clean := redact(text):
        log.write(clean.encode(errors="surrogateescape"))
        log.flush()
    lines = _LINE_END.split(clean.encode(errors="surrogateescape"))
    yield from (line.decode(errors="replace").rstrip() for line in lines if line.strip())
