"""A whole run, `mcit` over the launcher over the stage's script, that is asked to stop or killed inside a stage."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_run import quiet, wait_for, write_two

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.pipeline.recipe.loading import load_recipe
from mcit.pipeline.run.child import run_child
from mcit.pipeline.run.locks import holder, locked
from mcit.pipeline.run.preemption import EXIT_CODE, Preempted
from mcit.pipeline.run.runner import start_run, train_stage
from mcit.pipeline.run.step import Launch

OVERRIDES = ("train.sft.args.max_steps=60", "train.checkpoint_every=1", "train.lora.dropout=0.1")
PATIENT = 400.0  # seconds, on a loaded machine
CODE = "from mcit.pipeline.cli import main; main()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A recipe, and a run whose data are prepared."""
    folder = write_two(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MCIT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        yield folder


def start_mcit(folder: Path, run: str, how: str) -> subprocess.Popen[str]:
    command = ["train", "two.yaml", "--stage", "1", "--run-dir", run, "--launch", how, *OVERRIDES]
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(folder: Path, run: str) -> int:
    """The step of the last checkpoint."""
    checkpoints = (folder / run / "stages" / ".01-first.partial" / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in checkpoints), default=0)


@pytest.mark.parametrize("how", ["single", pytest.param("fork", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_inside_a_stage_goes_on_there(folder: Path, how: str) -> None:
    """Asked to stop, it ends by itself with a checkpoint; one that is killed leaves nobody at work behind it."""
    stopped = f"stopped-{how}"
    lock = folder / stopped / "steps" / "train-1.lock"
    with start_mcit(folder, stopped, how) as mcit:
        wait_for(lambda: steps(folder, stopped) >= 2, PATIENT)
        children = psutil.Process(mcit.pid).children(recursive=True)
        mcit.terminate()
        said = mcit.communicate(timeout=PATIENT)[1]
    assert mcit.returncode == EXIT_CODE and "the same command goes on from here" in said
    assert holder(lock) is None
    wait_for(lambda: not any(child.is_running() for child in children), PATIENT if how == "fork" else 0)
    log = (folder / stopped / "logs" / "train-1.log").read_text()
    assert f"stopped after step {steps(folder, stopped)};" in log

    first = steps(folder, stopped)
    with start_mcit(folder, stopped, how) as mcit:
        wait_for(lambda: steps(folder, stopped) >= first + 2, PATIENT)
        mcit.kill()
    wait_for(lambda: holder(lock) is None and holder(lock.with_name("stage-1.lock")) is None, PATIENT)
    assert first + 2 <= steps(folder, stopped) < 60

    policies = []
    for name, launch in ((stopped, how), ("whole", "single")):
        run = start_run(load_recipe(folder / "two.yaml", OVERRIDES), folder / name, Launch.named(launch), quiet())
        train_stage(run, 1, quiet())
        policies.append(read_json(run.stage_dir(1) / "done.json")["policy"])
        assert not list((run.dir / "stages").glob(".*"))
    assert policies[0] == policies[1]


def test_a_script_cannot_be_started_beside_a_run(folder: Path) -> None:
    """By hand, say: it would write into the same folder."""
    from mcit.pipeline.sft import make_trainer
    from mcit.pipeline.stage.stage import run_stage

    recipe = load_recipe(folder / "two.yaml", OVERRIDES)
    with locked(folder / "whole" / "steps" / "stage-1.lock", "stage 1"):
        with pytest.raises(InputError, match=f"stage 1 of .* is being done by process {os.getpid()}"):
            run_stage(recipe, 1, folder / "whole", "sft", make_trainer)


def test_a_stage_that_was_trained_but_not_noted_is_kept(folder: Path) -> None:
    """A kill between the stage's last file and the step's marker."""
    run = start_run(load_recipe(folder / "two.yaml", OVERRIDES), folder / "whole", Launch.named("single"), quiet())
    before = (run.stage_dir(1) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    (run.stage_dir(1) / "done.json").unlink()
    shutil.copytree(run.stage_dir(1) / "delta", run.dir / "stages" / ".01-first.partial")
    train_stage(run, 1, quiet())
    assert (run.stage_dir(1) / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert run.training()[0].done() and not list((run.dir / "stages").glob(".*"))


# --- The launcher between ---------------------------------------------------------------------------------------------

LAUNCHED = """
import os, sys, time
from mcit.pipeline.run.preemption import EXIT_CODE, Preempted, preemptible
with preemptible():
    try:
        print("up as", os.getpid(), flush=True)
        time.sleep(60)
    except Preempted:
        time.sleep(2.5)  # it writes a checkpoint, and is asked again meanwhile
        print("stopped well", flush=True)
        sys.exit(EXIT_CODE)
"""


def launched(tmp_path: Path) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED)
    return Launch.named("single").command(script)


def test_a_launcher_waits_for_what_it_started(tmp_path: Path) -> None:
    """accelerate would die of the signal at once, and leave a script that still writes."""

    def interrupt(line: str) -> None:
        if line.startswith("up as"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(launched(tmp_path), tmp_path / "log", os.environ, interrupt, launcher=True)
    assert "stopped well" in (tmp_path / "log").read_text()


def test_a_script_that_was_stopped_by_others_is_known_through_its_launcher(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if found := re.fullmatch(r"up as (\d+)", line):
            os.kill(int(found[1]), signal.SIGUSR1)

    with pytest.raises(Preempted, match="stopped well"):
        run_child(launched(tmp_path), tmp_path / "log", os.environ, stop, launcher=True)
