"""Paths side by side: each is a process that waits for its turn, so that whatever slows a machine slows all of them."""

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

Seconds = dict[str, list[float]]  # of each path, its turns


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int, logs: Path) -> Seconds:
    """Start a process for each path, which trains under `Turns`, and give each its turn in every round.

    What they print is in `logs`; of one that ends early it is shown. Raises `RuntimeError` then.
    """
    running = dict[str, subprocess.Popen[str]]()
    try:
        for path, command in commands.items():
            running[path] = _start(command, logs / f"{path}.log")
            _said(path, running[path], logs)
        seconds: Seconds = {path: [] for path in commands}
        for _ in range(rounds):
            for path, process in running.items():
                _go(process)
                seconds[path].append(_said(path, process, logs))
        for path, process in running.items():  # they write what they have trained
            _go(process)
            if process.wait():
                raise RuntimeError(_failed(path, logs))
        return seconds
    finally:
        for process in running.values():
            process.kill()


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)


def _go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def _said(path: str, process: subprocess.Popen[str], logs: Path) -> float:
    assert process.stdout
    if not (line := process.stdout.readline()):
        raise RuntimeError(_failed(path, logs))
    return float(json.loads(line))


def _failed(path: str, logs: Path) -> str:
    return f"{path} ended early:\n{(logs / f'{path}.log').read_text()[-3000:]}"


class Turns(TrainerCallback):
    """Holds training after `warm` steps, and after each turn of `each`, until `take_turns` lets it go on.

    Tells it what a step of the turn took: from the end of the one before to its own, the batch's making included.
    """

    def __init__(self, warm: int, each: int, told: TextIO):
        self.warm, self.each, self.told, self.began = warm, each, told, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.warm
        if done >= 0 and done % self.each == 0:
            seconds = (clock() - self.began) / self.each
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # of glibc: what a step has freed, for the path whose turn is next
            print(json.dumps(seconds), file=self.told, flush=True)
            sys.stdin.readline()
            self.began = clock()


def apart_from_stdout() -> TextIO:
    """This process's standard output, for `Turns` alone: whatever else is printed goes to the errors from here on."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return told


def clock() -> float:
    """Seconds: of this process's threads on a CPU, so that other work hardly counts; on a GPU those that pass."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def machine() -> dict[str, Any]:
    """What was measured on, and which clock."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "seconds": "wall clock" if torch.cuda.is_available() else "CPU",
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
