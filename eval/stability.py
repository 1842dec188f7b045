"""Continual evaluation: what happens between two rows of the matrix, from scores taken while the stages train.

A stage leaves `during.json` (`StageCurves`); end to end they are the curves of the stream. The measures are those of
De Lange et al., "Continual evaluation for lifelong learning: Identifying the stability gap" (arXiv 2205.13452), and
A-GEM's learning curve area (Chaudhry et al., arXiv 1812.00420, definition 3). Undefined is None, never 0.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json

from .stats import mean

FILE = "during.json"
WINDOWS = {"": 10, "_100": 100}  # suffix of WF and WP → w in optimizer steps; the paper's two (page)
BETA = 10  # A-GEM's (page): LCA averages what is scored after 0, 1, …, 10 steps

Curve = Sequence[tuple[int, float]]  # (optimizer step of the stream, score 0–100), steps increasing


class Scores(TypedDict):
    """A task's probes at several steps, one value a step."""

    exact: list[float]  # answers that greedy decoding would give as the gold has them, in percent
    stderr: list[float | None]  # of that, clustered by image
    logprob: list[float | None]  # mean log-probability of a gold token, in nats; None where it is not finite


class StageCurves(TypedDict):
    """`stages/<kk>-<name>/during.json`."""

    schedule: dict[str, float]  # dense, growth, probes: the measures depend on what was looked at
    data: dict[str, str]  # task → the identity of the test part that its probes are from
    steps: list[int]  # of the stage: 0 is the entering policy, the last one the policy it leaves
    tasks: dict[str, Scores]


class TaskCurve(Scores):
    """A task's scores over the stream."""

    steps: list[int]  # of the stream


class Curves(TypedDict):
    """`curves` of `results.json`."""

    schedule: dict[str, float]
    ends: list[int]  # stage 0…k → steps of the stream when it ended
    tasks: dict[str, TaskCurve]  # in the order they were learned


def read_curves(folder: Path) -> StageCurves | None:
    """What a stage's folder tells of its training; None if nothing was asked. Raises `InputError`."""
    path = folder / FILE
    if not path.exists():
        return None
    found = read_json(path)
    missing = [key for key in StageCurves.__annotations__ if not isinstance(found, dict) or key not in found]
    if missing:
        raise InputError("is missing", where=path, field=missing[0], remedy="Train the stage again")
    return cast(StageCurves, found)


def join_curves(stages: Sequence[StageCurves]) -> Curves:
    """The stages 1…k end to end; they have one schedule.

    Where a stage begins stands the policy that the one before has left, and what was scored then counts; of a task that
    is new, the score of the entering policy is all there is.
    """
    ends, points = [0], dict[str, dict[int, tuple[float, float | None, float | None]]]()
    for stage in stages:
        for task, scores in stage["tasks"].items():
            rows = zip(scores["exact"], scores["stderr"], scores["logprob"], strict=True)
            for step, row in zip(stage["steps"], rows, strict=True):
                points.setdefault(task, {}).setdefault(ends[-1] + step, row)
        ends.append(ends[-1] + stage["steps"][-1])
    tasks = {task: _columns(rows) for task, rows in points.items()}
    return {"schedule": stages[0]["schedule"], "ends": ends, "tasks": tasks}


def stability_metrics(
    curves: Mapping[str, Curve], learned: Mapping[str, int], ends: Sequence[int]
) -> dict[str, float | None]:
    """min_ACC, WC_ACC, WF, WP (w = 10; `_100`: w = 100) and LCA of the curves of a whole stream.

    `learned[i]` in 1…K is the stage L_i that first trained task i of N, `ends[k]` the step at which stage k ended
    (`ends[0]` = 0). With A(i, t) the score of task i after step t of the stream, T_i = `ends[L_i]`, "old" the tasks
    with L_i < K, and t, m, n the steps that were looked at:

    - min_ACC = mean over old tasks of min_{t > T_i} A(i, t)
    - WC_ACC = mean over all tasks of that minimum, or for the others A(i, `ends[K]`); one task a stage: the paper's
      A(K, ·) / K + (1 − 1/K) min_ACC
    - WF = mean over all tasks of max_{m < n < m + w} A(i, m) − A(i, n), or 0 where the score never falls;
      WP the same of A(i, n) − A(i, m). Steps are the optimizer's, so that w means the same under any schedule
    - LCA = mean over all tasks of the mean of A(i, T_{L_i − 1} + b) over b = 0, …, 10, T_k being `ends[k]`

    What was not looked at cannot be counted: a sparse schedule finds less forgetting, and LCA needs the first ten
    steps. A measure is None when it has no task to average over or lacks a score that it needs. (The authors' code
    prunes its search for increases by the rule for decreases, so that its WP is often too small; its LCA averages ten
    points, not A-GEM's eleven.)
    """
    last = len(ends) - 1
    worst = {
        task: min((score for step, score in curves.get(task, ()) if step > ends[stage]), default=None)
        for task, stage in learned.items()
        if stage < last
    }
    final = {task: dict(curves.get(task, ())).get(ends[last]) for task in learned}
    return {
        "min_ACC": _mean(list(worst.values())),
        "WC_ACC": _mean([worst.get(task, final[task]) for task in learned]),
        **{
            name + suffix: _mean([_largest_change(curves.get(task, ()), window, sign) for task in learned])
            for name, sign in (("WF", -1), ("WP", 1))
            for suffix, window in WINDOWS.items()
        },
        "LCA": _mean([_first_scores(curves.get(task, ()), ends[stage - 1]) for task, stage in learned.items()]),
    }


def curves_metrics(curves: Curves, learned: Mapping[str, int], stages: int) -> dict[str, float | None]:
    """`stability_metrics` of the exact matches in a run's `curves`; None as long as they lack one of its `stages`."""
    if len(curves["ends"]) <= stages:
        return stability_metrics({}, {}, [0])
    exact = {task: list(zip(curve["steps"], curve["exact"], strict=True)) for task, curve in curves["tasks"].items()}
    return stability_metrics(exact, learned, curves["ends"])


def _columns(rows: Mapping[int, tuple[float, float | None, float | None]]) -> TaskCurve:
    exact, stderr, logprob = zip(*rows.values(), strict=True)
    return {"steps": list(rows), "exact": list(exact), "stderr": list(stderr), "logprob": list(logprob)}


def _largest_change(curve: Curve, window: int, sign: int) -> float | None:
    """The largest rise (`sign` 1) or fall (−1) between two points less than `window` steps apart; at least 0."""
    changes, start = [], 0
    for n, (step, score) in enumerate(curve):
        while curve[start][0] <= step - window:
            start += 1
        changes += [sign * (score - before) for _, before in curve[start:n]]
    return max(0.0, *changes) if changes else None


def _first_scores(curve: Curve, start: int) -> float | None:
    """The mean score after 0, 1, …, `BETA` steps from `start` on."""
    scores = dict(curve)
    return _mean([scores.get(start + shots) for shots in range(BETA + 1)])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
