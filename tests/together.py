"""Processes that train together, as `accelerate launch` would start them, forked from one that has imported everything.

A launch spends most of its time on importing torch, TRL and DeepSpeed, once in the launcher and once in each process.
Here the launcher itself is run once for each mode, to see what environment it gives to its processes; these are then
forked, and call a script's `main` as the script does. `training.launch` goes through the launcher every time.
"""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds that the others have to end in when one has failed


def train_together(
    run: Path, recipe: Path, mode: str, processes: int, *overrides: str, stage: int = 2, script: str = "sft"
) -> None:
    """Train a stage in as many processes, each of which writes `RUN/process-<rank>.log`."""
    from torch.distributed import TCPStore  # here: `python together.py` needs none of it

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # at a port that is free
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    arguments = ["--recipe", str(recipe), "--stage", str(stage), "--run-dir", str(run), *overrides]
    started, logs = [], [run / f"process-{rank}.log" for rank in range(processes)]
    for rank, log in enumerate(logs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = {**os.environ, **launched(mode, processes), **here, **own}
        started.append(_server().Process(target=_train, args=(environment, log, script, arguments)))
        started[-1].start()
    left: list[Any] = list(started)
    while left and not any(process.exitcode for process in started):
        wait([process.sentinel for process in left])
        left = [process for process in left if process.is_alive()]
    failed = [log for process, log in zip(started, logs, strict=True) if process.exitcode]
    for process in left:
        process.join(PATIENCE)
        process.kill()
    assert not failed, failed[0].read_text(errors="replace")[-4000:]


@cache
def launched(mode: str, processes: int) -> dict[str, str]:
    """What `accelerate launch` adds to the environment of the first of its processes."""
    import mcit.recipes

    config = Path(mcit.recipes.__file__).parent / "accelerate" / f"{mode}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "environment.json"
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--num_processes", str(processes), "--main_process_port", "0", __file__, str(file)),
        ]
        before = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=before)
        assert done.returncode == 0, done.stderr[-4000:]
        return {key: value for key, value in json.loads(file.read_text()).items() if os.environ.get(key) != value}


@cache
def _server() -> Any:
    """What processes are forked from: a process without threads that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mcit.pipeline.sft", "mcit.pipeline.rft"])
    return context


def _train(environment: dict[str, str], log: Path, script: str, arguments: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [f"{script}.py", *arguments]
    module = importlib.import_module(f"mcit.pipeline.{script}")
    module.main(script, module.make_trainer)


if __name__ == "__main__" and os.environ["RANK"] == "0":
    Path(sys.argv[1]).write_text(json.dumps(dict(os.environ)))
