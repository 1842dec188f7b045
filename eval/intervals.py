"""How a run's metrics would vary with other test samples: bootstrap intervals of one run, over its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from mcit.data_prep.files import read_jsonl

from .metrics import continual_metrics
from .stats import LEVEL, RESAMPLES, image_clusters, resampled_means

SAME = 1e-6  # points by which the mean of a cell's rows may differ from its score


class Bounds(TypedDict):
    """A 95 % interval in points of 0–100."""

    low: float
    high: float


def metric_intervals(
    run_dir: Path, tasks: Sequence[str], matrix: Sequence[Sequence[float | None]], learned: Sequence[int]
) -> dict[str, Bounds]:
    """The 95 % interval of each metric of `continual_metrics` over other test samples like these.

    `matrix` has the rows 0…K, and its predictions are in `run_dir`. In each of 1,999 resamples the images of every task
    are drawn anew with replacement, the same ones for all stages, since a task's stages are scored on the same samples;
    the metrics are taken of the resampled matrix (percentile bootstrap, clustered by image: Efron & Tibshirani, "An
    Introduction to the Bootstrap", 1993, ch. 8 and 13). A maximum over stages (`forgetting`) is biased upwards in
    resamples as it is in the data. What is undefined has no interval, nor has anything where a task has fewer than two
    images, no predictions, or a score that is no mean over its answers (BLEU of a test set).
    """
    columns = [_column(run_dir, task, i, matrix, seed=i) for i, task in enumerate(tasks)]
    if any(column is None for column in columns):
        return {}
    drawn = np.stack([column for column in columns if column is not None], axis=-1)  # [resamples, stages, tasks]
    found: dict[str, list[float]] = {}
    for resampled in drawn:
        rows = [[None if np.isnan(score) else float(score) for score in row] for row in resampled]
        for name, value in continual_metrics(rows, learned, row0=True).items():
            if value is not None:
                found.setdefault(name, []).append(value)
    edges = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    bounds = {name: np.percentile(values, edges).tolist() for name, values in found.items()}
    return {name: {"low": low, "high": high} for name, (low, high) in bounds.items()}


def _column(
    run_dir: Path, task: str, place: int, matrix: Sequence[Sequence[float | None]], seed: int
) -> np.ndarray | None:
    """[resamples, stages] scores of a task, nan where it was not evaluated; None where they cannot be resampled."""
    scored = [k for k, row in enumerate(matrix) if row[place] is not None]
    if not scored:
        return np.full((RESAMPLES, len(matrix)), np.nan)
    files = [run_dir / "predictions" / f"{k:02d}" / f"{task}.jsonl" for k in scored]
    if not all(file.exists() for file in files):
        return None
    tables = [{row["id"]: row for row in read_jsonl(file)} for file in files]
    ids = list(tables[0])
    if any(list(table) != ids for table in tables):
        return None
    scores = np.array([[table[name]["score"] for table in tables] for name in ids])
    if any(abs(a - (matrix[k][place] or 0.0)) > SAME for a, k in zip(scores.mean(axis=0), scored, strict=True)):
        return None
    images = image_clusters(tables[0][name].get("image_id") for name in ids)
    if len(set(images)) < 2:
        return None
    column = np.full((RESAMPLES, len(matrix)), np.nan)
    column[:, scored] = np.clip(resampled_means(scores, images, seed), 0, 100)
    return column
