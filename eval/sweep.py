"""`RUN/results.json` of a sweep: means and intervals over its runs, of the metrics and of the cells of the matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json

from .results import SCHEMA_VERSION, Results, StageInfo, TaskInfo, read_results
from .stats import Interval, mean_interval


class MemberResults(TypedDict):
    """One run of a sweep."""

    name: str  # its folder below the sweep's
    order: str | None  # None: the stream's own
    seed: int
    metrics: dict[str, float | None]


class Matrix(TypedDict):
    """The mean matrix of the runs with the same stages: under another order a row means something else."""

    order: str | None
    runs: list[str]
    tasks: list[TaskInfo]
    stages: list[StageInfo]
    learned: dict[str, int]
    cells: list[list[Interval | None]]  # rows are stages 0…K; None where no run has the cell


class SweepResults(TypedDict):
    """`RUN/results.json` of a sweep."""

    schema_version: int
    name: str
    method: dict[str, Any]
    runs: list[MemberResults]
    metrics: dict[str, Interval | None]  # over the runs in which it is defined; None where it is in none
    matrices: list[Matrix]


def assemble_sweep(name: str, runs: Sequence[tuple[str, str | None, Results]]) -> SweepResults:
    """The results of a sweep from those of at least one run, as (folder's name, order, results).

    A metric's mean is over all runs, whatever their order; the matrix is averaged by order.
    """
    groups: dict[str, list[tuple[str, str | None, Results]]] = {}
    for run in runs:
        groups.setdefault(hash_json([run[1], run[2]["stages"], run[2]["learned"]]), []).append(run)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "method": runs[0][2]["method"],
        "runs": [
            {"name": folder, "order": order, "seed": result["seed"], "metrics": result["metrics"]}
            for folder, order, result in runs
        ],
        "metrics": {
            metric: _interval([result["metrics"].get(metric) for *_, result in runs])
            for metric in dict.fromkeys(metric for *_, result in runs for metric in result["metrics"])
        },
        "matrices": [_matrix(group) for group in groups.values()],
    }


def is_sweep(path: Path) -> bool:
    """Whether a directory holds the results of a sweep."""
    file = path / "results.json"
    content = read_json(file) if file.exists() else None
    return isinstance(content, dict) and "matrices" in content


def read_sweep(path: Path) -> SweepResults:
    """Read the results of a sweep, or those of a run as a sweep of one. Raises `InputError`."""
    if not is_sweep(path):
        result = read_results(path)
        return assemble_sweep(result["name"], [(path.resolve().name, None, result)])
    content, file = read_json(path / "results.json"), path / "results.json"
    if content.get("schema_version") != SCHEMA_VERSION:
        problem = f"has schema version {content.get('schema_version')}, expected {SCHEMA_VERSION}"
        raise InputError(problem, where=file, remedy="Run `mcit run` on the folder to write it anew")
    if missing := [key for key in SweepResults.__annotations__ if key not in content]:
        raise InputError("is missing", where=file, field=missing[0])
    return cast(SweepResults, content)


def _matrix(group: Sequence[tuple[str, str | None, Results]]) -> Matrix:
    first = group[0][2]
    return {
        "order": group[0][1],
        "runs": [folder for folder, *_ in group],
        "tasks": first["tasks"],
        "stages": first["stages"],
        "learned": first["learned"],
        "cells": [
            [_interval([result["matrix"][k][i] for *_, result in group]) for i in range(len(first["tasks"]))]
            for k in range(len(first["stages"]))
        ],
    }


def _interval(values: Sequence[float | None]) -> Interval | None:
    known = [value for value in values if value is not None]
    return mean_interval(known) if known else None
