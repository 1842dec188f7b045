"""Children of a fork server: to `run_child` they are what processes from nothing are."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from test_run import wait_for

from mcit.data_prep.errors import InputError
from mcit.pipeline.run.child import ChildFailed, run_child
from mcit.pipeline.run.forks import SCRIPT, ForkServer, fork_server
from mcit.pipeline.run.locks import holder, locked
from mcit.pipeline.run.preemption import Preempted
from mcit.pipeline.run.step import Launch

Run = Callable[..., list[str]]


@pytest.fixture(scope="module")
def server() -> ForkServer:
    """One that has imported something, and met something that cannot be imported."""
    return ForkServer([sys.executable, "-P", str(SCRIPT), "decimal", "no_such_module"], os.environ)


@pytest.fixture
def run(server: ForkServer, tmp_path: Path) -> Run:
    """Runs a script in a fork; returns the lines that it showed."""

    def run(code: str, *arguments: object, show: Callable[[str], None] | None = None, locks: tuple[int, ...] = ()):
        script, lines = tmp_path / "script.py", list[str]()
        script.write_text(textwrap.dedent(code))
        command = [str(script), *map(str, arguments)]
        run_child(command, tmp_path / "log", os.environ, show or lines.append, *locks, start=server.start)
        return lines

    return run


def test_a_fork_runs_a_script_as_python_does(run, server, tmp_path, monkeypatch):
    """Its arguments, folder, name and module path; output of both kinds; an input that is empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("value = 7\n")
    code = """
        import os, sys
        import beside
        print(__name__, sys.modules["__main__"].__dict__ is globals(), sys.argv[1:], os.getcwd(), beside.value)
        print(repr(sys.stdin.read()), "decimal" in sys.modules, file=sys.stderr)
    """
    assert run(code, "a", 1) == [f"__main__ True ['a', '1'] {tmp_path} 7", "'' True"]
    assert (tmp_path / "log").read_text().count("\n") == 2


def test_a_fork_runs_a_module(server, tmp_path):
    lines: list[str] = []
    run_child(["-m", "platform", "terse"], tmp_path / "log", os.environ, lines.append, start=server.start)
    assert len(lines) == 1 and lines[0].startswith("Linux")


def test_forks_share_nothing_but_what_was_imported(run):
    code = """
        import decimal, os
        print(decimal.getcontext().prec, len(os.listdir("/proc/self/fd")), os.getpid() == os.getpgrp())
        decimal.getcontext().prec = 3
        open("/dev/null")
    """
    assert run(code) == run(code)


@pytest.mark.parametrize(
    ("code", "error", "text"),
    [
        ("print('error: a.json: is empty'); raise SystemExit(2)", InputError, r"^a\.json: is empty$"),
        ("print('stopped well'); raise SystemExit(75)", Preempted, "^stopped well$"),
        ("print('x'); 1 / 0", ChildFailed, r"(?s)ZeroDivisionError.*exit code 1;"),
        ("import os; os.kill(os.getpid(), 9)", ChildFailed, "exit code -9;"),
    ],
)
def test_how_a_fork_ends_is_told(run, code, error, text):
    with pytest.raises(error, match=text):
        run(code)
    assert run("print('the next one runs')") == ["the next one runs"]


def test_a_fork_holds_the_step_s_lock_and_its_server_does_not(run, tmp_path):
    lock, found = tmp_path / "x.lock", list[object]()
    with locked(lock, "x") as descriptor:
        run("print(1)", locks=(descriptor,))
        held = [path for path in Path("/proc").glob("[0-9]*/fd/*") if _leads(path, lock)]
        assert {path.parts[2] for path in held} == {str(os.getpid())}

    def look(line: str) -> None:
        found.append([path for path in Path(f"/proc/{line}/fd").iterdir() if _leads(path, lock)])

    with locked(lock, "x") as descriptor:
        run("import os, time; print(os.getpid(), flush=True); time.sleep(0.2)", show=look, locks=(descriptor,))
    assert len(found) == 1 and len(found[0]) == 1 and holder(lock) is None


def _leads(path: Path, to: Path) -> bool:
    try:
        return path.readlink() == to
    except OSError:
        return False


def test_an_interrupt_stops_a_fork_and_what_it_has_started(run):
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.extend(map(int, line.split()))
        raise KeyboardInterrupt

    code = """
        import os, subprocess, time
        print(os.getpid(), subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    """
    with pytest.raises(KeyboardInterrupt):
        run(code, show=interrupt)
    assert len(pids) == 2
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), 60)


def test_a_fork_is_asked_to_stop_and_answers(run, tmp_path):
    """It does not hear it before it is ready to: what came earlier is waiting for it."""
    code = """
        import os, signal, sys
        from mcit.pipeline.run.preemption import EXIT_CODE, Preempted, preemptible
        os.kill(os.getpid(), signal.SIGUSR1)
        print("goes on", flush=True)
        try:
            with preemptible():
                signal.pause()
        except Preempted:
            sys.exit(EXIT_CODE)
    """
    with pytest.raises(Preempted):
        run(code)
    assert "goes on" in (tmp_path / "log").read_text()


def test_a_server_ends_with_its_client(server):
    code = f"""
        import os, sys
        from mcit.pipeline.run.forks import SCRIPT, ForkServer
        print(ForkServer([sys.executable, str(SCRIPT)], os.environ)._process.pid, flush=True)
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for(lambda: not psutil.pid_exists(int(done.stdout)) or _is_zombie(int(done.stdout)), 60)


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(ChildFailed, match=r"(?s)no_such_file.*could not be started: .*no_such_file"):
        ForkServer([sys.executable, "no_such_file"], os.environ)


def test_there_is_one_server_for_a_command_and_environment_and_a_new_one_for_a_dead_one():
    command = [sys.executable, "-P", str(SCRIPT)]
    first = fork_server(command, os.environ)
    assert fork_server(command, dict(os.environ)) is first
    assert fork_server(command, {**os.environ, "X": "1"}) is not first
    first._process.kill()
    first._process.wait()
    assert fork_server(command, os.environ) is not first


def test_the_launch(monkeypatch):
    launch = Launch.named("fork")
    assert launch.forks and launch.command("x") == Launch.named("single").command("x") and launch.mode == "single"
    with pytest.raises(InputError, match="starts one process, not 2"):
        Launch.named("fork", 2)
    monkeypatch.setattr("mcit.pipeline.run.step.gpu_gib", lambda: 80.0)
    with pytest.raises(InputError, match=r"--launch fork: is for machines without a GPU.* Add --launch single"):
        Launch.named("fork")
