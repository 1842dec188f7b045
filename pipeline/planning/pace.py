"""How long things take, from runs that were measured: with the same base model, on the machine that did them.

    training    seconds of a stage = start + tokens × pace
    answers     seconds of an evaluation = start + answers × pace

`pace` is the time that training itself took over its tokens (`train_runtime`), `start` what a stage took beyond it, on
average. Of answers, `pace` is the median over cells of seconds an answer, `start` what is left of their sum.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mcit.data_prep.files import read_json, read_jsonl
from mcit.eval.serving import read_serving

# Without a measurement: the share of a card's peak at which the shape of Qwen2.5-VL-3B trained on an H100 (989 TFLOPS
# in bfloat16): 6 × 3.75 billion parameters × 4,720 tokens in 1.15 s (benchmarks/real_size.json).
UTILISATION = 0.09


class Pace(NamedTuple):
    """Seconds."""

    start: float  # of a stage, or of an evaluation
    each: float  # a token, or an answer
    measured: int  # stages, or cells, that it is from

    def seconds(self, units: float, starts: int = 1) -> float:
        """What `units` take."""
        return self.start * starts + self.each * units


def measured_training(runs: Iterable[Path], base_hash: str, paradigm: str) -> Pace | None:
    """The pace of training in earlier runs; of RFT, a unit is a completion. None if none was measured."""
    starts, times, units = [], 0.0, 0.0
    for folder in _stages(runs, base_hash):
        marker, log = read_json(folder / "done.json"), read_jsonl(folder / "train_log.jsonl")
        runtime = next((row["train_runtime"] for row in reversed(log) if "train_runtime" in row), None)
        train = marker["inputs"]["train"]
        if runtime is None or train["paradigm"] != paradigm:
            continue
        if paradigm == "sft":
            done = next((row["num_tokens"] for row in reversed(log) if "num_tokens" in row), None)
        else:
            done = marker["trained"]["steps"] * train["global_batch_size"]
        if done:
            starts.append(marker["seconds"] - runtime)
            times, units = times + runtime, units + done
    return Pace(statistics.mean(starts), times / units, len(starts)) if starts else None


def measured_answers(runs: Iterable[Path], base_hash: str) -> Pace | None:
    """The pace of evaluation in earlier runs."""
    cells, evaluations = [], 0
    for run in runs:
        if not _is_of(run, base_hash):
            continue
        found = [read_json(path) for path in sorted((run / "predictions").glob("[0-9]*/*.done.json"))]
        cells += [(cell["seconds"], cell["n"]) for cell in found if cell["n"]]
        evaluations += bool(found)
    if not cells:
        return None
    each = statistics.median(seconds / n for seconds, n in cells)
    start = max(0.0, sum(seconds for seconds, _ in cells) - each * sum(n for _, n in cells)) / evaluations
    return Pace(start, each, len(cells))


def assumed_training(parameters: int, tflops: float, checkpointing: bool) -> Pace:
    """Without a measurement: 2 operations a parameter and token forward, 2 backward, 2 for a layer that runs again."""
    operations = parameters * (6 if checkpointing else 4)
    return Pace(0.0, operations / (tflops * 1e12 * UTILISATION), 0)


def _stages(runs: Iterable[Path], base_hash: str) -> Iterable[Path]:
    for run in runs:
        if _is_of(run, base_hash):
            for marker in sorted((run / "stages").glob("[0-9]*-*/trained.json")):
                if (marker.parent / "done.json").exists() and (marker.parent / "train_log.jsonl").exists():
                    yield marker.parent


def _is_of(run: Path, base_hash: str) -> bool:
    folder = run / "stages" / "00-base"
    return (folder / "serving.json").exists() and read_serving(folder).base_hash == base_hash
