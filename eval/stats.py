"""Uncertainty of a mean score."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence


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
