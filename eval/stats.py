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


def drawn_runs(runs: Sequence[tuple[Hashable, Hashable]], seed: int = 0) -> np.ndarray:
    """[1 + resamples, runs]: how much each run, named by (group, unit), counts when groups and units are drawn anew.

    Groups are drawn with replacement, as many as there are, and in each of those drawn its units (hierarchical
    bootstrap: Davison & Hinkley, "Bootstrap Methods and their Application", 1997, sec. 3.8). Every group drawn weighs
    the same, every unit drawn of it too, and the runs of a unit share its weight, so that a row sums to 1. In the first
    row each is drawn once.
    """
    groups: dict[Hashable, dict[Hashable, list[int]]] = {}
    for place, (group, unit) in enumerate(runs):
        groups.setdefault(group, {}).setdefault(unit, []).append(place)
    generator, weights = np.random.default_rng(seed), np.zeros((1 + RESAMPLES, len(runs)))
    times = generator.multinomial(len(groups), [1 / len(groups)] * len(groups), size=RESAMPLES)
    for units, drawn in zip(groups.values(), times.T, strict=True):
        counts = generator.multinomial(drawn * len(units), [1 / len(units)] * len(units))
        counts = np.vstack([np.ones(len(units)), counts])
        for places, count in zip(units.values(), counts.T, strict=True):
            weights[:, places] = (count / (len(groups) * len(units) * len(places)))[:, None]
    return weights


def bootstrap_error(drawn: np.ndarray, units: int) -> float | None:
    """The standard error of a mean over `units` independent units, from its value in resamples that drew them anew.

    The spread over resamples, times sqrt(n / (n − 1)), by which drawing n of n falls short (Davison & Hinkley 1997,
    sec. 2.3). None for fewer than two units.
    """
    return None if units < 2 else float(drawn.std(ddof=1)) * math.sqrt(units / (units - 1))


def error_interval(value: float, error: float | None, units: int) -> Interval:
    """A 95 % t interval from a standard error: value ± t_{0.975, n−1} · error."""
    from scipy.stats import t  # here: takes a second, and most commands do not need it

    if error is None:
        return {"mean": value, "low": None, "high": None, "n": units}
    half = float(t.ppf((1 + LEVEL) / 2, units - 1)) * error
    return {"mean": value, "low": value - half, "high": value + half, "n": units}


def error_test(value: float, error: float | None, units: int) -> float | None:
    """The two-sided p-value of a t test against 0, with n − 1 degrees of freedom; None without an error."""
    from scipy.stats import t  # here: takes a second, and most commands do not need it

    if error is None:
        return None
    if error == 0:
        return float(value == 0)
    return float(2 * t.sf(abs(value) / error, units - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for being several (Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979).

    The i-th smallest of m is multiplied by m − i + 1, and is no smaller than those before it, nor larger than 1. What
    is None was not tested: it stays, and does not count.
    """
    tested = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    floor = 0.0
    for rank, (value, place) in enumerate(tested):
        floor = max(floor, min(1.0, (len(tested) - rank) * value))
        corrected[place] = floor
    return corrected
