"""What the records of a board say of its methods: means with intervals, differences, ranks, and published orders.

A method's figure is a mean over its runs. It would vary with other bases, other seeds and other test pictures: all
three are drawn anew, the pictures the same ones for every run, as the test sets are. Orders are those that the board
has. A difference between two methods is taken between runs with the same base, order and seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..forgetting import shown_and_known, split_parts
from ..stats import (
    RESAMPLES,
    Interval,
    bootstrap_error,
    drawn_runs,
    error_interval,
    error_test,
    holm,
    resampled_means,
)
from .records import Answers, Record, as_row, right

METRICS = ("AP", "MFT", "BWT", "essential", "superficial", "general")
LEVEL = 0.05  # below which corrected p-values tell two methods apart
_NAMES = {"AP": "MFN"}  # of `metrics`, where it is another
_COLUMNS = 6  # of a task's answers: the scores then and now, and what they show and know, above chance


class Difference(NamedTuple):
    """How much more one method has than another."""

    interval: Interval
    p: float | None  # corrected for the number of differences that were looked at together


class Board:
    """Records, with every figure under other pictures."""

    def __init__(self, records: Sequence[Record]):
        self.records = list(records)
        self._drawn = drawn_metrics(self.records)  # metric → [1 + resamples, records]

    def runs(self, method: str) -> dict[tuple[str, str | None, int], int]:
        """The runs of a method: (base, order, seed) → place among the records."""
        named = [(place, one) for place, one in enumerate(self.records) if one["method"] == method]
        return {(one["base"], one["order"], one["seed"]): place for place, one in named}

    def mean(self, method: str, metric: str) -> Interval | None:
        """A metric's mean over the runs of a method that have it; None if none has."""
        drawn = self._drawn[metric]
        runs = {key: drawn[:, place] for key, place in self.runs(method).items() if not np.isnan(drawn[0, place])}
        return _estimate(runs)[0] if runs else None

    def differences(self, pairs: Sequence[tuple[str, str]], metric: str = "AP") -> list[Difference | None]:
        """The first method of each pair minus the second; their p-values are corrected together.

        None where the two have no run with the same base, order and seed.
        """
        found = [self._difference(*pair, metric) for pair in pairs]
        corrected = holm([one and one[1] for one in found])
        return [one and Difference(one[0], p) for one, p in zip(found, corrected, strict=True)]

    def ranks(self, methods: Sequence[str], metric: str = "AP") -> dict[str, int]:
        """1 and the number of methods that are better by more than chance: who cannot be told apart shares a rank."""
        pairs = [(one, other) for at, one in enumerate(methods) for other in methods[at + 1 :]]
        better = dict.fromkeys(methods, 0)
        for (one, other), found in zip(pairs, self.differences(pairs, metric), strict=True):
            if found and found.p is not None and found.p < LEVEL:
                better[other if found.interval["mean"] > 0 else one] += 1
        return {method: 1 + count for method, count in better.items()}

    def agreement(self, published: Mapping[str, float], metric: str = "AP") -> tuple[float, float, list[str]] | None:
        """Kendall's τ of the board's order of methods and a published one, its p-value, and the methods of both.

        τ-b (Kendall, "The Treatment of Ties in Ranking Problems", 1945). None for fewer than three methods.
        """
        from scipy.stats import kendalltau  # here: takes a second

        ours = {method: found["mean"] for method in published if (found := self.mean(method, metric))}
        if len(ours) < 3:
            return None
        found = kendalltau(list(ours.values()), [published[method] for method in ours])
        return float(found.statistic), float(found.pvalue), list(ours)

    def _difference(self, one: str, other: str, metric: str) -> tuple[Interval, float | None] | None:
        mine, theirs, drawn = self.runs(one), self.runs(other), self._drawn[metric]
        runs = {key: drawn[:, mine[key]] - drawn[:, theirs[key]] for key in mine if key in theirs}
        runs = {key: values for key, values in runs.items() if not np.isnan(values[0])}
        return _estimate(runs) if runs else None


def _estimate(runs: Mapping[tuple[str, str | None, int], np.ndarray]) -> tuple[Interval, float | None]:
    """The mean over runs, and its p-value: (base, order, seed) → [1 + resamples], a value and those drawn."""
    units = [(base, seed) for base, _, seed in runs]
    drawn = (drawn_runs(units) * np.column_stack(list(runs.values()))).sum(axis=1)
    value, count = float(drawn[0]), len(set(units))
    error = bootstrap_error(drawn[1:], count)
    return error_interval(value, error, count), error_test(value, error, count)


def drawn_metrics(records: Sequence[Record]) -> dict[str, np.ndarray]:
    """metric → [1 + resamples, records]: as it is in a run, and under other pictures; nan where a run has not got it.

    Where a run's answers to a task were not kept, its score is the same under all pictures.
    """
    answers = [{**one["answers"], **one["general"]} for one in records]
    columns = _drawn_answers(answers)
    tables = {metric: np.full((1 + RESAMPLES, len(records)), np.nan) for metric in METRICS}
    for place, record in enumerate(records):
        parts = {task: columns[place, task] for task in answers[place]}
        for metric, compute in _COMPUTE.items():
            value = record["metrics"].get(_NAMES.get(metric, metric))
            if value is not None:
                tables[metric][0, place] = value
                tables[metric][1:, place] = compute(record, parts)
    return tables


def _drawn_answers(answers: Sequence[Mapping[str, Answers]]) -> dict[tuple[int, str], np.ndarray]:
    """(record, task) → [resamples, 6]; the pictures of a test set are drawn once for all records."""
    tests: dict[tuple[str, str, int], list[tuple[int, np.ndarray]]] = {}
    for place, tasks in enumerate(answers):
        for task, kept in tasks.items():
            tests.setdefault((task, kept["test"], len(kept["last"])), []).append((place, _columns(kept)))
    found = {}
    for (task, test, size), tables in tests.items():
        drawn = resampled_means(np.hstack([table for _, table in tables]), range(size), seed=int(test, 16))
        for at, (place, _) in enumerate(tables):
            found[place, task] = drawn[:, at * _COLUMNS : (at + 1) * _COLUMNS]
    return found


def _columns(kept: Answers) -> np.ndarray:
    """[samples, 6]: the scores then and now; what each shows and knows then, and now."""
    then, now, chance = kept["learned"] or kept["last"], kept["last"], kept["chance"] or 0.0
    split = [[shown_and_known(as_row(letter, chance)) for letter in letters] for letters in (then, now)]
    return np.column_stack([right(then), right(now), *split])


def _final(record: Record, parts: Mapping[str, np.ndarray], task: str) -> np.ndarray | float:
    return parts[task][:, 1] if task in parts else _cell(record, -1, task)


def _fresh(record: Record, parts: Mapping[str, np.ndarray], task: str) -> np.ndarray | float:
    return parts[task][:, 0] if task in parts else _cell(record, record["learned"][task], task)


def _cell(record: Record, stage: int, task: str) -> float:
    value = record["matrix"][stage][list(record["learned"]).index(task)]
    return np.nan if value is None else value


def _mean(values: Sequence[np.ndarray | float]) -> np.ndarray | float:
    return sum(values) / len(values)


def _ap(record: Record, parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
    return _mean([_final(record, parts, task) for task in record["learned"]])


def _mft(record: Record, parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
    return _mean([_fresh(record, parts, task) for task in record["learned"]])


def _bwt(record: Record, parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
    old = [task for task, first in record["learned"].items() if first < len(record["matrix"]) - 1]
    return _mean([_final(record, parts, task) - _fresh(record, parts, task) for task in old])


def _split(column: int) -> Callable[[Record, Mapping[str, np.ndarray]], np.ndarray | float]:
    """Of the mean over tasks of what `split_parts` gives, a column."""

    def compute(record: Record, parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
        tasks = record["split"]
        if not all(task in parts for task in tasks):
            return record["metrics"][("loss", "essential", "superficial")[column]] or 0.0
        return _mean([split_parts(parts[task][:, 2:])[:, column] for task in tasks])

    return compute


def _general(record: Record, parts: Mapping[str, np.ndarray]) -> np.ndarray | float:
    if not record["general"]:
        return record["metrics"]["general"] or 0.0
    return _mean([parts[task][:, 1] for task in record["general"]])


_COMPUTE = {
    "AP": _ap,
    "MFT": _mft,
    "BWT": _bwt,
    "essential": _split(1),
    "superficial": _split(2),
    "general": _general,
}
