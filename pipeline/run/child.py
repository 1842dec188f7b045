"""Child processes that leave a log, show where they are, and never outlive the run that started them."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from mcit.data_prep.errors import InputError

from .preemption import EXIT_CODE, PATIENCE, SIGNALS, Preempted, deaf_children
from .redaction import redact

# Reads the child's process group, then waits for a second line that says the child has ended. If this process dies
# first, by whatever signal, the pipe closes instead: the group is asked to stop, and killed if it does not.
_WATCHDOG = f"""
read group; read ended && exit
kill -s TERM -- "-$group"
for second in $(seq {PATIENCE}); do sleep 1; kill -s $0 -- "-$group" || exit; done
kill -s KILL -- "-$group"
"""
_EXIT = re.compile(r"exit status (\d+)|exitcode\s*: (\d+)")  # what accelerate and torch say of a process that fails
_LINE_END = re.compile(rb"[\r\n]+")


class Child(Protocol):
    """What is needed of a child process that leads a process group of its own, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], Sequence[int]], Child]  # of a command, under what environment


class ChildFailed(Exception):
    """A child process ended with an error that is not the user's; the text holds its last lines and the log's path."""


def run_child(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    show: Callable[[str], None],
    *keep_open: int,
    launcher: bool = False,
    start: Start | None = None,
) -> None:
    """Run `command` with its output in `log`, calling `show` with each line it prints (progress bars included).

    The child inherits the file descriptors `keep_open`, the step's locks, so that the step stays locked until the child
    too is gone. It is a new process unless `start` makes it otherwise (`ForkServer.start`). A `launcher` does not hear
    what asks processes to stop, at which it would end or kill those that it started; they hear it, and it ends with
    them. Raises `InputError` with the child's own line if it refused its input, `Preempted` if it says that it was
    asked to stop, otherwise `ChildFailed`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    last: deque[str] = deque(maxlen=100)
    refused = None
    begin = partial(start or spawn, command, env, keep_open)
    with open(log, "wb") as file, watched(begin, file, launcher) as child:
        assert child.stdout is not None
        for line in lines(child.stdout, file):
            last.append(line)
            refused = line.removeprefix("error: ") if line.startswith("error: ") else refused
            show(line.strip())
        code = child.wait()
    if code:
        codes = {code, *(int(found[1] or found[2]) for found in map(_EXIT.search, last) if found)}
        if refused and 2 in codes:
            raise InputError(refused)
        if EXIT_CODE in codes:
            raise Preempted(next((line for line in reversed(last) if line.startswith("stopped ")), "stopped"))
        raise ChildFailed("\n".join([*_without_launcher(list(last))[-15:], f"exit code {code}; the whole log: {log}"]))


def spawn(command: Sequence[str], env: Mapping[str, str], keep_open: Sequence[int]) -> subprocess.Popen[bytes]:
    """A new process that runs `command`."""
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=keep_open,
    )


@contextlib.contextmanager
def watched(begin: Callable[[], Child], log: IO[bytes], launcher: bool) -> Iterator[Child]:
    """The child in a process group of its own, stopped when the block is left by an error or this process dies.

    What a launcher that died has left of its group does not outlive the block either. A launcher's group is asked again
    and again: what it has not started yet would not hear it.
    """
    with deaf_children(*SIGNALS):
        watchdog = subprocess.Popen(
            ["sh", "-c", _WATCHDOG, "TERM" if launcher else "0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    with deaf_children(*(SIGNALS if launcher else (signal.SIGUSR1,))):
        child = begin()
        assert watchdog.stdin is not None
        watchdog.stdin.write(f"{child.pid}\n".encode())
        watchdog.stdin.flush()
    try:
        yield child
    finally:
        if child.poll() is None or _lives(child.pid):
            _stop(child, log, again=launcher)
        with contextlib.suppress(BrokenPipeError):
            watchdog.stdin.write(b"ended\n")
            watchdog.stdin.close()
        watchdog.wait()


def _stop(child: Child, log: IO[bytes], again: bool) -> None:
    """Ask the child's group to stop, once or `again` and again, and kill it if that takes more than `PATIENCE`.

    What it still says is logged.
    """
    assert child.stdout is not None
    rest = threading.Thread(target=deque, args=(lines(child.stdout, log), 0), daemon=True)
    rest.start()
    start, asked = time.monotonic(), -1.0
    while child.poll() is None or _lives(child.pid):
        passed = time.monotonic() - start
        if passed - asked >= 1 and (again or asked < 0 or passed > PATIENCE):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM if passed < PATIENCE else signal.SIGKILL)
            asked = passed
        time.sleep(0.05)
    rest.join(1.0)


def _lives(group: int) -> bool:
    """Whether a process group has a process that still runs, not one that only waits for its parent to notice."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return any(_runs_in(group, path) for path in Path("/proc").glob("[0-9]*/stat"))


def _runs_in(group: int, stat: Path) -> bool:
    with contextlib.suppress(OSError):
        state, _, of, *_ = stat.read_text().rpartition(")")[2].split()
        return int(of) == group and state not in "ZX"
    return False


def _without_launcher(said: list[str]) -> list[str]:
    """The lines without the traceback in which the launcher only says that its script has failed."""
    starts = [place for place, line in enumerate(said) if line.startswith("Traceback ")]
    of_launcher = starts and any("accelerate/commands/launch.py" in line for line in said[starts[-1] :])
    return said[: starts[-1]] if of_launcher else said


def lines(stream: IO[bytes], log: IO[bytes]) -> Iterator[str]:
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
    parts = _LINE_END.split(clean.encode(errors="surrogateescape"))
    yield from (part.decode(errors="replace").rstrip() for part in parts if part.strip())
