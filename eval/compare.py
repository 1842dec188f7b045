"""Two runs, or two sweeps, against each other: differences with intervals that pair what the two have in common.

Two policies mostly fail on the same questions, and questions on one image share its difficulty. So the difference
between two runs is taken sample by sample, and the images are what is drawn again.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np

from mcit.data_prep.files import read_jsonl

from .intervals import SAME
from .results import read_results
from .stats import LEVEL, Interval, image_clusters, mean, mean_interval

RESAMPLES = 9_999  # scipy's default
_BATCH = 100  # resamples computed at once; memory is this times the images of all tasks

What = Literal["last", "change"]


class Answer(NamedTuple):
    """One line of a predictions file."""

    score: float  # 0–100
    image: Hashable  # the cluster it belongs to


class Difference(TypedDict):
    """How much more the second run has than the first."""

    difference: float
    low: float | None  # 95 % interval; None with fewer than two images in a task
    high: float | None
    n: int  # samples that both answered


class Comparison(TypedDict):
    """What `compare_runs` finds. A task's score is that after the last stage; None where a run lacks it."""

    tasks: dict[str, Difference | None]  # those that both runs have
    MFN: Difference | None  # these two need the same tasks in both runs, in any order
    BWT: Difference | None


class Paired(NamedTuple):
    """A sum over samples, by image: the mean over a task's samples is Σ sums / Σ counts."""

    sums: np.ndarray  # [images]
    counts: np.ndarray  # [images], samples of each


def compare_runs(first: Path, second: Path) -> Comparison:
    """The second run minus the first, in points of 0–100, with 95 % intervals by a paired bootstrap over images.

    Samples are paired by id and references. In each of 9,999 resamples the images of every task are drawn anew, with
    replacement, their samples and both runs' scores with them (cluster bootstrap: Efron & Tibshirani, "An Introduction
    to the Bootstrap", 1993, ch. 8; paired for two systems: Koehn, "Statistical Significance Tests for Machine
    Translation Evaluation", 2004); the interval holds the middle 95 % of the differences (percentile method). The
    generator's seed is fixed. It speaks of other samples for these two trained models, not of other seeds: that is what
    sweeps are for. Raises `InputError` for a run without results.
    """
    runs = [_Run(path) for path in (first, second)]
    common = [task for task in runs[0].tasks if task in runs[1].tasks]
    same = set(runs[0].tasks) == set(runs[1].tasks)
    return {
        "tasks": {task: _difference([_pair(runs, task, "last", (1.0, 1.0))]) for task in common},
        "MFN": _difference([_pair(runs, task, "last", (1 / len(common),) * 2) for task in common]) if same else None,
        "BWT": _difference([_pair(runs, task, "change", _shares(runs, task)) for task in common]) if same else None,
    }


def compare_members(
    first: Mapping[str, Mapping[str, float | None]], second: Mapping[str, Mapping[str, float | None]]
) -> dict[str, Interval]:
    """The metrics of a second sweep minus those of a first, paired by the runs that both have: mean and t interval.

    Each argument maps a run's name in its sweep (`seed-0`) to its metrics. What no pair of runs has is left out.
    """
    pairs = [(first[name], second[name]) for name in first if name in second]
    found: dict[str, list[float]] = defaultdict(list)
    for one, other in pairs:
        for metric, value in one.items():
            against = other.get(metric)
            if value is not None and against is not None:
                found[metric].append(against - value)
    return {metric: mean_interval(differences) for metric, differences in found.items()}


class _Run:
    """A run's scores, read when they are asked for."""

    def __init__(self, path: Path):
        self.path, self.results = path, read_results(path)
        self.tasks = [task["name"] for task in self.results["tasks"]]
        self.learned = self.results["learned"]
        self.last = len(self.results["stages"]) - 1
        self.old = [task for task in self.tasks if self.learned[task] < self.last]
        self._cells: dict[tuple[int, str], dict[Hashable, Answer] | None] = {}

    def cell(self, stage: int, task: str) -> dict[Hashable, Answer] | None:
        """A cell's answers by id and references; None if it was not evaluated, or is no mean of theirs."""
        if (stage, task) not in self._cells:
            score = self.results["matrix"][stage][self.tasks.index(task)]
            self._cells[stage, task] = None if score is None else self._read(stage, task, score)
        return self._cells[stage, task]

    def scores(self, task: str, what: What) -> dict[Hashable, float] | None:
        """Each sample's score after the last stage, or its change since the task was learned."""
        last, fresh = self.cell(self.last, task), self.cell(self.learned[task], task)
        if last is None or (what == "change" and fresh is None):
            return None
        before = fresh if what == "change" else None
        return {key: answer.score - (before[key].score if before else 0.0) for key, answer in last.items()}

    def _read(self, stage: int, task: str, score: float) -> dict[Hashable, Answer] | None:
        rows = list(read_jsonl(self.path / "predictions" / f"{stage:02d}" / f"{task}.jsonl"))
        if abs(mean([row["score"] for row in rows]) - score) > SAME:
            return None  # the cell is of all answers together (BLEU), and no difference of samples is one of cells
        images = image_clusters(row.get("image_id") for row in rows)
        return {
            (row["id"], *row["references"]): Answer(row["score"], image)
            for row, image in zip(rows, images, strict=True)
        }


def _shares(runs: Sequence[_Run], task: str) -> tuple[float, float] | None:
    """The weight of a task in each run's BWT; None where a run's BWT is undefined."""
    if not all(run.old for run in runs):
        return None
    one, other = (1 / len(run.old) if task in run.old else 0.0 for run in runs)
    return one, other


def _pair(runs: Sequence[_Run], task: str, what: What, weights: tuple[float, float] | None) -> Paired | None:
    """What a task adds to a difference: over the common samples, second weight × second score − first × first."""
    one, other = (run.scores(task, what) for run in runs)
    answers = runs[0].cell(runs[0].last, task)
    if weights is None or one is None or other is None or answers is None or not one.keys() & other.keys():
        return None
    totals: dict[Hashable, list[float]] = {}
    for key in one:
        if key in other:
            total = totals.setdefault(answers[key].image, [0.0, 0.0])
            total[0] += weights[1] * other[key] - weights[0] * one[key]
            total[1] += 1
    columns = np.array(list(totals.values()))
    return Paired(columns[:, 0], columns[:, 1])


def _difference(parts: Iterable[Paired | None]) -> Difference | None:
    """The sum over tasks of the mean over samples, and its interval; None where a task has none."""
    known: list[Paired] = []
    for part in parts:
        if part is None:
            return None
        known.append(part)
    if not known:
        return None
    value = float(sum(part.sums.sum() / part.counts.sum() for part in known))
    low, high = _bootstrap(known)
    return {"difference": value, "low": low, "high": high, "n": int(sum(part.counts.sum() for part in known))}


def _bootstrap(parts: Sequence[Paired]) -> tuple[float | None, float | None]:
    """The interval of Σ_tasks (Σ sums / Σ counts) when the images of each task are drawn anew."""
    from scipy.stats import bootstrap  # here: takes a second, and most commands do not need it

    if any(len(part.sums) < 2 for part in parts):
        return None, None

    def statistic(*drawn: np.ndarray, axis: int) -> np.ndarray:
        """[resamples] from the numbers of the images drawn, [resamples, images] a task."""
        means = [p.sums[i].sum(axis) / p.counts[i].sum(axis) for p, i in zip(parts, drawn, strict=True)]
        return np.sum(means, axis=0)

    images = [np.arange(len(part.sums)) for part in parts]
    found = bootstrap(
        images,
        statistic,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
