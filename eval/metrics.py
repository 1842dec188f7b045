"""Continual-learning metrics of a score matrix. Undefined is None, never 0."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json

from .stability import Curves, curves_metrics
from .stats import mean

Matrix = Sequence[Sequence[float | None]]


def continual_metrics(
    matrix: Matrix, learned: Sequence[int] | None = None, row0: bool = False, most: float = 100
) -> dict[str, float | None]:
    """MFT, MFN, AP, MAA, BWT, BWT_over_T, FWT and forgetting of `matrix`, scores in 0–`most`, cells not evaluated None.

    Rows are the stages 1…K (with `row0` the base comes first, as stage 0), columns the N tasks. `learned[i]` in 1…K is
    the stage L_i that first trained task i; by default task i was learned at stage i + 1, which needs K = N. With P the
    matrix, "old" the tasks learned before the last stage (L_i < K) and "later" those not learned at once (L_i > 1):

    - MFT = mean_i P[L_i][i]; MFN = AP = mean_i P[K][i]
    - MAA = mean over stages k of (mean over the tasks with L_i ≤ k of P[k][i])
    - BWT = mean over old tasks of P[K][i] − P[L_i][i]; BWT_over_T = the same sum over N, so MFN − MFT
    - FWT = mean over later tasks of P[L_i − 1][i] − P[0][i]
    - forgetting = mean over old tasks of max_{L_i ≤ k < K} P[k][i] − P[K][i]; never less than −BWT

    For one task a stage these are the usual formulas: T − 1 tasks are old and T − 1 are later. (SEFE, arXiv 2505.02486,
    divides BWT by T; MLLM-CL and MCITlib by T − 1. Lopez-Paz & Ranzato 2017; Chaudhry et al. 2018 for forgetting.)
    A metric is None when it has no task to average over, when it needs row 0 and there is none, or when a cell that it
    needs is missing. Rows may stop early (lower-triangular); what they leave out was not evaluated. The arguments are
    not changed. Raises `InputError` for cells that are no scores, rows that get shorter, and a wrong `learned`.
    """
    rows = _validated(matrix, row0, most)
    base, stages = (rows[0], rows[1:]) if row0 else (None, rows)
    count, last = len(rows[0]), len(stages)
    learned = _validated_learned(learned, count, last)

    def cell(stage: int, task: int) -> float | None:
        return stages[stage - 1][task]

    old = [task for task in range(count) if learned[task] < last]
    final = [cell(last, task) for task in range(count)]
    fresh = [cell(learned[task], task) for task in range(count)]
    change = [_minus(final[task], fresh[task]) for task in old]
    seen = [
        _mean([cell(stage, task) for task in range(count) if learned[task] <= stage])
        for stage in range(min(learned), last + 1)
    ]
    best = [_max([cell(stage, task) for stage in range(learned[task], last)]) for task in old]
    ahead = [_minus(cell(learned[i] - 1, i), base[i]) for i in range(count) if learned[i] > 1] if base else []
    bwt = _mean(change)
    return {
        "MFT": _mean(fresh),
        "MFN": _mean(final),
        "AP": _mean(final),
        "MAA": _mean(seen),
        "BWT": bwt,
        "BWT_over_T": None if bwt is None else bwt * len(old) / count,
        "FWT": _mean(ahead),
        "forgetting": _mean([_minus(top, final[task]) for top, task in zip(best, old, strict=True)]),
    }


def metrics_file(path: Path | str) -> dict[str, float | None]:
    """The metrics of a JSON file: `{"matrix": [[…]], "row0": bool, "learned": …}`, or a run's `results.json`.

    `learned` is a list in the order of the columns, or a mapping from task to stage; the mapping is read in the order
    of `tasks` (names, or objects with a `name`) where the file has it, else in its own. Raises `InputError`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or "matrix" not in content:
        raise InputError("has no matrix", where=path, remedy='Expected {"matrix": [[…]], "row0": …, "learned": …}')
    unknown = set(content) - {"matrix", "row0", "learned", "tasks"}
    if unknown and "schema_version" not in content:
        remedy = "Known: matrix, row0, learned, tasks"
        raise InputError("unknown key", where=path, field=min(unknown), remedy=remedy)
    row0, learned = content.get("row0", False), content.get("learned")
    if not isinstance(row0, bool):
        raise InputError("must be true or false", where=path, field="row0")
    try:
        columns = _in_column_order(learned, content.get("tasks")) if isinstance(learned, dict) else learned
        most = math.inf if "schema_version" in content else 100  # of a run; captions may be worth more under a protocol
        found = continual_metrics(content["matrix"], columns, row0, most)
    except InputError as error:
        raise InputError(str(error), where=path) from None
    if "curves" in content and isinstance(learned, dict):  # as a run has them
        curves = content["curves"]
        if not isinstance(curves, dict) or not {"ends", "tasks"} <= curves.keys():
            raise InputError("is not what `mcit run` writes", where=path, field="curves")
        found |= curves_metrics(cast(Curves, curves), learned, len(content["matrix"]) - row0)
    measured = content.get("metrics")  # of a run, what its matrix alone does not give
    return {**measured, **found} if isinstance(measured, dict) else found


def _in_column_order(learned: Mapping[str, Any], tasks: Any) -> list[Any]:
    if tasks is None:
        return list(learned.values())
    if not _is_list(tasks) or not all(
        isinstance(task, str) or (isinstance(task, dict) and "name" in task) for task in tasks
    ):
        raise InputError("must list the names of the tasks", field="tasks")
    names = [task["name"] if isinstance(task, dict) else task for task in tasks]
    if set(names) != set(learned):
        raise InputError("names other tasks than `tasks`", field="learned")
    return [learned[name] for name in names]


def _validated(matrix: Any, row0: bool, most: float) -> list[list[float | None]]:
    """A copy of the matrix with short rows filled up with None."""
    if not _is_list(matrix) or not all(map(_is_list, matrix)) or len(matrix) <= row0 or not any(map(len, matrix)):
        raise InputError("must be a list of rows, one a stage, with one score a task", field="matrix")
    count = max(map(len, matrix))
    for k, row in enumerate(matrix):
        if k > row0 and len(row) < len(matrix[k - 1]):
            remedy = "A row may stop where nothing more was evaluated, but later rows are at least as long"
            raise InputError(f"has {len(row)} cells, the row before it more", field=f"matrix[{k}]", remedy=remedy)
        for i, value in enumerate(row):
            score = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most
            if value is not None and not score:
                remedy = "A cell is a score in 0–100, or null where it was not evaluated"
                raise InputError(f"is {value!r}", field=f"matrix[{k}][{i}]", remedy=remedy)
    return [[None if value is None else float(value) for value in row] + [None] * (count - len(row)) for row in matrix]


def _validated_learned(learned: Any, tasks: int, stages: int) -> list[int]:
    if learned is None:
        if tasks != stages:
            problem = f"is needed: {tasks} tasks and {stages} stages do not say which stage learned which task"
            raise InputError(problem, field="learned")
        return list(range(1, tasks + 1))
    if not _is_list(learned) or len(learned) != tasks:
        raise InputError(f"must give the stage that first trained it for each of {tasks} tasks", field="learned")
    for i, stage in enumerate(learned):
        if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= stages:
            raise InputError(f"is {stage!r}", field=f"learned[{i}]", remedy=f"A stage is a whole number in 1–{stages}")
    return list(learned)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _max(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None
