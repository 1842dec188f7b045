"""What a stage is doing, for whoever looks while it trains, and what it has cost, for the results."""

import math
import resource
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from mcit.data_prep.files import write_json
from mcit.eval.results import StageCost

from .workplace import LIVE, Progress, read_progress

if TYPE_CHECKING:
    from transformers import Trainer

_EVERY = 2.0  # seconds between writes


class Live(TrainerCallback):
    """Keeps `live.json`, and counts the time of all attempts, those that were killed up to their last lines.

    `start` is when the stage's process began to train, by `time.monotonic`.
    """

    def __init__(self, folder: Path, start: float):
        self.file, self.start = folder / LIVE, start
        self.before: Mapping[str, Any] = read_progress(folder) or {}
        self.started_at = time.process_time()
        self.first, self.began, self.written = 0, start, 0.0
        self.loss: float | None = None

    @property
    def seconds(self) -> float:
        """Of all attempts."""
        return round(self.before.get("seconds", 0.0) + time.monotonic() - self.start, 3)

    @property
    def processor_seconds(self) -> float:
        """Of this process's threads in all attempts, of which those before are the main process's."""
        return round(self.before.get("processor_seconds", 0.0) + time.process_time() - self.started_at, 3)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first, self.began = state.global_step, time.monotonic()
        self._write(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)
        if time.monotonic() - self.written > _EVERY:
            self._write(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def _write(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        done, left = state.global_step - self.first, None
        if done:
            left = round((time.monotonic() - self.began) / done * (state.max_steps - state.global_step), 1)
        loss = self.loss if self.loss is not None and math.isfinite(self.loss) else None
        progress = Progress(
            step=state.global_step,
            steps=state.max_steps,
            loss=loss,
            seconds=self.seconds,
            processor_seconds=self.processor_seconds,
            left=left,
        )
        write_json(self.file, progress)
        self.written = time.monotonic()


def stage_cost(trainer: "Trainer", seconds: float, processor_seconds: float, samples: int) -> StageCost:
    """What a stage has cost; `samples` is the global batch. All processes call this together, each with its seconds."""
    on_gpu = torch.cuda.is_available()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    own = [host, torch.cuda.max_memory_allocated() if on_gpu else 0, round(1000 * processor_seconds)]
    accelerator = trainer.accelerator
    all_of_them = accelerator.gather(torch.tensor(own, device=accelerator.device)).view(-1, len(own)).cpu()
    peaks, processor = all_of_them.amax(0), int(all_of_them[:, 2].sum())
    hours = round(seconds * accelerator.num_processes / 3600, 6)
    return {
        "steps": trainer.state.global_step,
        "samples": trainer.state.global_step * samples,
        "tokens": _tokens(trainer.state.log_history),
        "process_hours": hours,
        "processor_hours": round(processor / 3.6e6, 6),
        "gpu_hours": hours if on_gpu else 0.0,
        "peak_host_bytes": int(peaks[0]),
        "peak_gpu_bytes": int(peaks[1]) if on_gpu else None,
    }


def both(first: StageCost, second: StageCost) -> StageCost:
    """What two phases of a stage have cost: sums, and the higher peaks."""
    peaks = [cost["peak_gpu_bytes"] or 0 for cost in (first, second)]
    return {
        "steps": first["steps"] + second["steps"],
        "samples": first["samples"] + second["samples"],
        "tokens": first["tokens"] + second["tokens"],
        "process_hours": round(first["process_hours"] + second["process_hours"], 6),
        "processor_hours": round(first["processor_hours"] + second["processor_hours"], 6),
        "gpu_hours": round(first["gpu_hours"] + second["gpu_hours"], 6),
        "peak_host_bytes": max(first["peak_host_bytes"], second["peak_host_bytes"]),
        "peak_gpu_bytes": max(peaks) or None,
    }


def _tokens(log: Sequence[Mapping[str, Any]]) -> int:
    """Those that went through the model in training, as TRL counts them."""
    return int(next((row["num_tokens"] for row in reversed(log) if "num_tokens" in row), 0))
