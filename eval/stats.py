"""Uncertainty of a mean score."""

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypedDict

import numpy as np

LEVEL = 0.95  # of every interval
RESAMPLES = 1_999  # of `resampled_means`, which every run's results need anew: of 95 %, fifty lie beyond each bound
_AT_ONCE = 10_000_000  # draws held at once


class Interval(TypedDict):
    """A mean over runs. The bounds are None for fewer than two: then there is nothing to estimate them by."""

    mean: float
    low: float | None
    high: float | None
    n: int  # runs


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value, summed exactly."""
    return math.fsum(values) / len(values)


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """Cluster-robust standard error of the mean of `values`; row i belongs to `clusters[i]`.

    With e = value − mean, n rows and G clusters: sqrt(G / (G − 1) · Σ_clusters (Σ_rows e)²) / n. Questions on one image
    share its difficulty, so that treating them as independent understates the error. When every cluster has one row
    this is the plain standard error s / √n. None for fewer than two clusters: then there is nothing to estimate it by.
    Source: Liang & Zeger 1986; Cameron & Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, eq. 11–12.
    """
    centre = mean(values)
    sums: defaultdict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - centre
    count = len(sums)
    if count < 2:
        return None
    return math.sqrt(count / (count - 1) * math.fsum(total**2 for total in sums.values())) / len(values)


def image_clusters(images: Iterable[Hashable | None]) -> list[Hashable]:
    """The clusters of rows by the image each is about; a row without one (None) is its own."""
    return [("row", number) if image is None else ("image", image) for number, image in enumerate(images)]


def resampled_means(values: np.ndarray, clusters: Sequence[Hashable], seed: int = 0) -> np.ndarray:
    """Column means of `values` [rows, columns] in each of `RESAMPLES` resamples: [resamples, columns].

    The clusters are drawn anew with replacement, their rows with them, every column alike (cluster bootstrap: Efron &
    Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 8). What is drawn independently takes another
    `seed`. All nan for fewer than two clusters.
    """
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    count = len(places)
    if count < 2:
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    sums = np.zeros((count, values.shape[1] + 1))  # of the cluster's rows, and their number
    np.add.at(sums, [places[cluster] for cluster in clusters], np.column_stack([values, np.ones(len(values))]))
    generator, means, batch = np.random.default_rng(seed), [], max(1, _AT_ONCE // count)
    for start in range(0, RESAMPLES, batch):
        times = generator.multinomial(count, [1 / count] * count, size=min(batch, RESAMPLES - start))
        totals = times @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of one figure over runs: mean ± t_{0.975, n−1} · s / √n (Student, "The Probable Error of
    a Mean", 1908).

    It answers how the mean would vary with other seeds (and orders) drawn like these, on the same test samples; the
    error from having only so many test samples is that of `clustered_stderr`.
    """
    from scipy.stats import t  # here: takes a second, and most commands do not need it

    count, centre = len(values), mean(values)
    if count < 2:
        return {"mean": centre, "low": None, "high": None, "n": count}
    half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": count}
