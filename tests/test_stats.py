"""Standard errors and intervals against matrix algebra, a library, and simulation."""

import random
import statistics

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from mcit.eval.stats import (
    RESAMPLES,
    bootstrap_error,
    clustered_stderr,
    drawn_runs,
    error_interval,
    error_test,
    holm,
    image_clusters,
    mean_interval,
)


def sandwich(values, clusters):
    """The cluster-robust error of a constant: the root of (X'X)⁻¹ (Σ_g X_g' e_g e_g' X_g) (X'X)⁻¹ · G / (G − 1)."""
    y, X = np.array(values)[:, None], np.ones((len(values), 1))
    bread = np.linalg.inv(X.T @ X)
    e = y - X @ (bread @ X.T @ y)
    groups = [np.array([c == g for c in clusters]) for g in sorted(set(clusters))]
    meat = sum(X[g].T @ e[g] @ e[g].T @ X[g] for g in groups)
    return float(np.sqrt(bread @ meat @ bread * len(groups) / (len(groups) - 1)).item())


def test_clustered_stderr_is_the_sandwich_of_a_regression_on_a_constant():
    rng = random.Random(0)
    for _ in range(100):
        n = rng.randint(3, 40)
        clusters = [rng.randrange(rng.randint(2, 12)) for _ in range(n)]
        values = [rng.uniform(0, 100) for _ in range(n)]
        if len(set(clusters)) > 1:
            assert clustered_stderr(values, clusters) == pytest.approx(sandwich(values, clusters), abs=1e-9)


def test_clustered_stderr_is_how_much_means_really_vary():
    """Questions on one image that mostly share its fate: the clustered error is right, the plain one far too small."""
    rng = np.random.default_rng(0)
    means, clustered, plain = [], [], []
    for _ in range(400):
        sizes = rng.integers(1, 9, 60)
        ease = np.repeat(rng.uniform(0, 1, 60), sizes)
        values = 100.0 * (rng.uniform(0, 1, len(ease)) < np.where(ease > 0.5, 0.95, 0.05))
        images = np.repeat(np.arange(60), sizes).tolist()
        means.append(values.mean())
        clustered.append(clustered_stderr(values.tolist(), images))
        plain.append(clustered_stderr(values.tolist(), range(len(values))))
    truth = statistics.stdev(means)
    assert statistics.mean(clustered) == pytest.approx(truth, rel=0.1)
    assert statistics.mean(plain) < 0.6 * truth


def test_rows_without_an_image_are_clusters_of_their_own():
    assert image_clusters(["x", None, "x", None]) == [("image", "x"), ("row", 1), ("image", "x"), ("row", 3)]


def test_mean_interval_is_student_s():
    rng = random.Random(1)
    for n in (2, 3, 5, 20):
        values = [rng.uniform(0, 100) for _ in range(n)]
        found, theirs = mean_interval(values), ttest_1samp(values, 0).confidence_interval(0.95)
        assert (found["mean"], found["n"]) == (pytest.approx(statistics.mean(values)), n)
        assert (found["low"], found["high"]) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    three = mean_interval([1.0, 2.0, 3.0])
    assert three["high"] == pytest.approx(2 + 4.302653 / 3**0.5)  # t of two degrees of freedom, from a table


def test_one_run_has_no_interval():
    assert mean_interval([7.0]) == {"mean": 7.0, "low": None, "high": None, "n": 1}
    assert mean_interval([7.0, 7.0]) == {"mean": 7.0, "low": 7.0, "high": 7.0, "n": 2}


# --- Runs, groups and several tests -----------------------------------------------------------------------------------


def test_groups_units_and_runs_are_drawn_in_turn():
    """By hand: of two groups, one has two units, of which one has two runs."""
    runs = [("a", 0), ("a", 0), ("a", 1), ("b", 0)]
    weights = drawn_runs(runs)
    assert weights.shape == (1 + RESAMPLES, 4) and weights[0].tolist() == [0.125, 0.125, 0.25, 0.5]
    assert np.allclose(weights.sum(axis=1), 1) and (weights[:, 0] == weights[:, 1]).all()
    # b is not drawn in a quarter of the resamples; then a is drawn twice, and four of its units: 1/4 of them each.
    without = weights[1:][weights[1:, 3] == 0]
    assert len(without) / RESAMPLES == pytest.approx(0.25, abs=0.03)
    shares, times = np.unique(without[:, 2], return_counts=True)
    assert shares.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert (times / len(without)).tolist() == pytest.approx(np.array([1, 4, 6, 4, 1]) / 16, abs=0.07)
    assert weights[1:].mean(axis=0).tolist() == pytest.approx(weights[0].tolist(), abs=0.02)


def test_the_error_over_units_is_that_of_their_mean():
    values = np.array([50.0, 53.0, 61.0, 48.0, 55.0])
    drawn = (drawn_runs([("a", seed) for seed in range(5)]) * values).sum(axis=1)
    error = bootstrap_error(drawn[1:], 5)
    assert drawn[0] == pytest.approx(53.4) and error == pytest.approx(values.std(ddof=1) / 5**0.5, rel=0.05)
    assert bootstrap_error(drawn, 1) is None


def test_intervals_and_tests_from_an_error():
    """t(0.975, 4) = 2.776 (tables); |t| = 2.776 is where p is 0.05."""
    low, high = pytest.approx(4.447, abs=1e-3), pytest.approx(15.553, abs=1e-3)
    assert error_interval(10.0, 2.0, 5) == {"mean": 10.0, "low": low, "high": high, "n": 5}
    assert error_test(-2.776, 1.0, 5) == pytest.approx(0.05, abs=1e-4)
    assert error_interval(10.0, None, 1)["low"] is None and error_test(10.0, None, 1) is None
    assert (error_test(0.0, 0.0, 3), error_test(0.1, 0.0, 3)) == (1.0, 0.0)


def test_holm_s_correction():
    """Smallest first: 0.005 × 4, 0.01 × 3, 0.03 × 2, and 0.04 × 1, which may not be below the one before."""
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([None]) == [None]
