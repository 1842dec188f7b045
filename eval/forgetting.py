"""Superficial and essential forgetting told apart: what a policy no longer shows, and what it no longer knows.

A question is asked twice: as it is, and with the answer held to the form that is asked for (`mcit.eval.constraints`).
What the second gets is *known*, whatever form the policy has slipped into; what the first gets is *shown*. Both are
corrected for guessing, since of a closed set some answers are right by chance.
"""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mcit.data_prep.files import read_jsonl

from .stats import LEVEL, image_clusters, resampled_means

Row = Mapping[str, Any]


class Estimate(TypedDict):
    """A figure in points of 0–100 and its 95 % interval over test samples; no bounds with fewer than two images."""

    value: float
    low: float | None
    high: float | None


class Split(TypedDict):
    """What became of a task, or on average of several, since it was learned; in points of 0–100, above chance."""

    n: int  # samples behind it
    loss: Estimate  # of what is shown; essential + superficial
    essential: Estimate  # of what is known
    superficial: Estimate  # the rest: by how much the gap between the two has grown
    recoverable: float  # of the answers after the last stage, % that are right but for their form


class Forgetting(TypedDict):
    """`forgetting` of `results.json`. Tasks are those learned before the last stage."""

    tasks: dict[str, Split]
    mean: Split | None  # over these tasks, each weighing the same; None if there are none
    left_out: dict[str, str]  # tasks that cannot be split, and why


def above_chance(score: float, chance: float) -> float:
    """100 · (p − c) / (1 − c), with p = score / 100 and c the chance of a guess, 0 ≤ c < 1.

    All right is 100, guessing is 0 on average, and a single wrong answer is below 0, so that guesses cancel out. This
    is the correction for guessing of multiple-choice tests ("formula scoring": right − wrong / (choices − 1)).
    """
    return 100 * (score / 100 - chance) / (1 - chance)


def shown_and_known(row: Row) -> tuple[float, float]:
    """What one answer shows and what it knows, above chance: its free and its constrained score.

    A free answer in a foreign form that scores nothing is no guess but no answer: 0, as formula scoring has it.
    """
    unanswered = not row["format_ok"] and row["score"] == 0
    shown = 0.0 if unanswered else above_chance(row["score"], row["chance"])
    return shown, above_chance(row["constrained_score"], row["chance"])


def knowledge(rows: Sequence[Row]) -> tuple[float, float]:
    """Mean of what the rows of a cell show and know. Below chance there is nothing to know: the means end at 0."""
    values = np.array([shown_and_known(row) for row in rows])
    shown, known = np.maximum(values.mean(axis=0), 0).tolist()
    return shown, known


def split_parts(means: np.ndarray) -> np.ndarray:
    """[…, 4] means (shown and known when learned, shown and known now) → […, 3] loss, essential, superficial."""
    shown_then, known_then, shown_now, known_now = np.moveaxis(np.maximum(means, 0), -1, 0)
    loss, essential = shown_then - shown_now, known_then - known_now
    return np.stack([loss, essential, loss - essential], axis=-1)


def split_forgetting(run_dir: Path, cells: Mapping[str, tuple[int, int]], left_out: Mapping[str, str]) -> Forgetting:
    """Split the forgetting of each task in `cells`: task → (the stage that learned it, the last stage).

    The predictions of both stages must be there, over the same samples, with constrained scores. Intervals are by a
    bootstrap over images, a sample's four figures drawn together, the tasks independently of each other.
    """
    values = {task: _values(run_dir, task, *stages) for task, stages in cells.items()}
    drawn = {
        task: split_parts(resampled_means(table, images, seed))
        for seed, (task, (table, images, _)) in enumerate(values.items())
    }
    parts = {task: split_parts(table.mean(axis=0)) for task, (table, _, _) in values.items()}
    tasks = {
        task: _split(len(table), parts[task], drawn[task], recoverable)
        for task, (table, _, recoverable) in values.items()
    }
    return {"tasks": tasks, "mean": _average(tasks, parts, drawn), "left_out": dict(left_out)}


def forgetting_metrics(found: Forgetting) -> dict[str, float | None]:
    """The means over the tasks; None where there is no task to average over."""
    mean = found["mean"]
    return {
        "superficial": mean and mean["superficial"]["value"],
        "essential": mean and mean["essential"]["value"],
        "recoverable": mean and mean["recoverable"],
    }


def _values(run_dir: Path, task: str, learned: int, last: int) -> tuple[np.ndarray, list[Hashable], float]:
    """[samples, 4]: what each shows and knows, then and now; the images they are about; the share in % that is right
    now but for its form."""
    then, now = (
        {row["id"]: row for row in read_jsonl(run_dir / "predictions" / f"{k:02d}" / f"{task}.jsonl")}
        for k in (learned, last)
    )
    held = [name for name, row in now.items() if row["chance"] is not None]
    table = np.array([shown_and_known(then[name]) + shown_and_known(now[name]) for name in held])
    recoverable = 100 * sum(now[name]["verdict"] == "wrong_format" for name in held) / len(held)
    return table, image_clusters(now[name]["image_id"] for name in held), recoverable


def _average(
    tasks: Mapping[str, Split], parts: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]
) -> Split | None:
    if not tasks:
        return None
    recoverable = sum(split["recoverable"] for split in tasks.values()) / len(tasks)
    samples = sum(split["n"] for split in tasks.values())
    return _split(samples, np.mean([*parts.values()], axis=0), np.mean([*drawn.values()], axis=0), recoverable)


def _split(samples: int, parts: np.ndarray, drawn: np.ndarray, recoverable: float) -> Split:
    loss, essential, superficial = estimates(parts, drawn)
    return {"n": samples, "loss": loss, "essential": essential, "superficial": superficial, "recoverable": recoverable}


def estimates(values: np.ndarray, drawn: np.ndarray) -> list[Estimate]:
    """`values` [columns] with the middle 95 % of `drawn` [resamples, columns], nan where there are no intervals."""
    bounds = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0).T.tolist()
    return [
        Estimate(value=value, low=None, high=None) if np.isnan(low) else Estimate(value=value, low=low, high=high)
        for value, (low, high) in zip(values.tolist(), bounds, strict=True)
    ]
