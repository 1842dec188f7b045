"""Children that are forked from a process that has imported what they need, in the place of processes from nothing.

A small model's stage trains for seconds, and PyTorch, transformers and TRL take as long to import. A fork server
imports them once, and then forks a child for each script; the child is what a process from nothing would be: it begins
with nothing but imports, has its own memory, group, output and locks, and all that it took goes back when it ends.
(Python's own `multiprocessing` has such a server too: it takes functions, not scripts, has the environment of whoever
comes first, and its children share one process group, so that what one starts could not be stopped with it.)

    python forks.py MODULE…

is the server: it imports the modules and serves what its standard input, a socket, asks for until that is closed. So it
ends with the process that started it, however that ends.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

SCRIPT = Path(__file__)
_MOST = 2**16  # bytes of a message
_READY = b"ready"


class Fork:
    """A running child of a server, with what `run_child` asks of a `subprocess.Popen`."""

    def __init__(self, pid: int, stdout: IO[bytes], server: socket.socket):
        self.pid, self.stdout, self._server = pid, stdout, server
        self._code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None as long as it runs."""
        return self.wait() if self._code is not None or select.select([self._server], [], [], 0)[0] else None

    def wait(self) -> int:
        """The exit code, once it has ended: negative for a signal, also that of a server that was killed itself."""
        if self._code is None:
            self._code = int(self._server.recv(_MOST) or -signal.SIGKILL)
        return self._code


class ForkServer:
    """A server as its one client has it. It serves one child at a time."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        """Start it by `command`, which ends with the modules to import, and wait until they are.

        Raises `ChildFailed` with its last lines if it ends before.
        """
        from .child import ChildFailed
        from .preemption import SIGNALS, deaf_children
        from .redaction import redact

        self._last: Fork | None = None
        self._socket, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tempfile.TemporaryFile() as log, end:
            with deaf_children(*SIGNALS):
                self._process = subprocess.Popen(
                    command, env=env, stdin=end.fileno(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            end.close()
            if self._socket.recv(_MOST) != _READY:
                log.seek(0)
                last = log.read().decode(errors="replace").strip().splitlines()[-15:]
                raise ChildFailed(redact("\n".join([*last, f"could not be started: {' '.join(command)}"])))

    def lives(self) -> bool:
        """Whether it still serves."""
        return self._process.poll() is None

    def start(self, command: Sequence[str], env: Mapping[str, str], keep_open: Sequence[int]) -> Fork:
        """Fork a child that runs `command`, a Python script or `-m` and a module, and their arguments.

        Its output goes to the pipe `stdout`; it holds the descriptors `keep_open` too, and blocks the signals that this
        thread blocks. `env` is the server's.
        """
        if self._last and self._last.poll() is None:
            raise RuntimeError(f"process {self._last.pid} is not done")
        read, write = os.pipe()
        try:
            blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
            request = {"argv": list(command), "folder": os.getcwd(), "blocked": blocked}
            socket.send_fds(self._socket, [json.dumps(request).encode()], [write, *keep_open])
            pid = int(self._socket.recv(_MOST) or 0)
        finally:
            os.close(write)
        if not pid:
            os.close(read)
            raise OSError("the process that stages are forked from has ended")
        self._last = Fork(pid, open(read, "rb"), self._socket)
        return self._last


_SERVERS: dict[tuple[Any, ...], ForkServer] = {}


def fork_server(command: Sequence[str], env: Mapping[str, str]) -> ForkServer:
    """The server of a command and an environment, started where there is none; it ends with this process."""
    key = (*command, *sorted(env.items()))
    if key not in _SERVERS or not _SERVERS[key].lives():
        _SERVERS[key] = ForkServer(command, env)
    return _SERVERS[key]


def _serve(client: socket.socket) -> list[str] | None:
    """Fork a child for each request; returns its arguments in a child, and None where nobody asks any more."""
    client.send(_READY)
    while True:
        message, descriptors, *_ = socket.recv_fds(client, _MOST, 16)
        if not message:
            return None
        request = json.loads(message)
        if not (pid := os.fork()):
            _become(request, descriptors[0], client)
            argv: list[str] = request["argv"]
            return argv
        os.setpgid(pid, pid)  # here as in the child: whoever hears of it may stop the group
        for descriptor in descriptors:
            os.close(descriptor)
        client.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        client.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: Mapping[str, Any], output: int, client: socket.socket) -> None:
    """Make this process, just forked, the child that was asked for."""
    os.setpgid(0, 0)
    os.chdir(request["folder"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, client.detach())
    for target in (1, 2):
        os.dup2(output, target)
    os.close(nothing)
    os.close(output)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def main() -> None:
    """The server; and, in the processes that it forks, the child."""
    if not sys.flags.safe_path:
        sys.path.pop(0)  # the folder of this file, whose modules are to be found as mcit's alone
    for module in sys.argv[1:]:
        with contextlib.suppress(Exception):  # the child meets it again, and says so in its log
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported stays, and stays shared
    sys.argv = _serve(socket.socket(fileno=0)) or []
    if sys.argv[:1] == ["-m"]:
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
