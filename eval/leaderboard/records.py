"""The record of a finished run: a few kilobytes that a board keeps of it, an answer a letter instead of its text."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json, read_jsonl
from mcit.data_prep.prepare import read_task

from ..results import Results, StageCost, read_results
from ..stats import image_clusters

SCHEMA_VERSION = 2
SHOWN = ("MFT", "MFN", "MAA", "BWT", "FWT", "forgetting", "superficial", "essential", "general", "general_base")

# A letter an answer: right, wrong, or no answer in the form that was asked for; capital where the answer held to that
# form is right, and 'r', 'w', 'n' also where there is no form to hold it to.
_FREE = "rwn"


class Answers(TypedDict):
    """A task's answers in the cells that the board's figures need, in the order of its test set."""

    test: str  # the test set's SHA-256, 12 digits: runs with the same are compared picture by picture
    chance: float | None  # of a guess, 0–1; None: its answers are held to no form
    learned: str | None  # by the stage that learned it; of a general task None
    last: str  # by the last stage


class Record(TypedDict):
    """One run of a board."""

    schema_version: int
    base: str
    method: str  # the board's name for what was run
    order: str | None  # None: the stream's own
    seed: int
    keeps: str  # nothing, general data, past data
    settings: dict[str, Any]  # the resolved `method:` of the recipe
    train: dict[str, Any]  # the resolved `train:`, what the board's page says of it
    learned: dict[str, int]  # task → stage
    matrix: list[list[float | None]]  # rounded to 0.01
    metrics: dict[str, float | None]
    split: list[str]  # tasks whose forgetting is split in superficial and essential
    answers: dict[str, Answers]  # of the tasks whose answers are a letter each
    general: dict[str, Answers]  # of tasks beside the stream
    engines: list[str]  # who answered
    train_seconds: float | None  # of all stages: of GPUs, or without one of processors, whatever else these did
    peak_bytes: int | None  # resident, of the stage that took most
    state_bytes: int  # what the methods hand on after the last stage
    hashes: dict[str, Any]
    versions: dict[str, str]


def make_record(
    run_dir: Path,
    *,
    base: str,
    method: str,
    order: str | None,
    keeps: str,
    train: Mapping[str, Any],
) -> Record:
    """The record of the run in `run_dir`. Raises `InputError` if its results are missing."""
    results = read_results(run_dir)
    last = len(results["stages"]) - 1
    costs = [cost for cost in results.get("cost", []) if cost]
    folder = run_dir / "stages" / f"{last:02d}-{results['stages'][last]['name']}" / "method"
    general = [task["name"] for task in results["general"]["tasks"]] if "general" in results else []
    return {
        "schema_version": SCHEMA_VERSION,
        "base": base,
        "method": method,
        "order": order,
        "seed": results["seed"],
        "keeps": keeps,
        "settings": results["method"],
        "train": dict(train),
        "learned": results["learned"],
        "matrix": [[cell if cell is None else round(cell, 2) for cell in row] for row in results["matrix"]],
        "metrics": {name: results["metrics"].get(name) for name in SHOWN},
        "split": list(results["forgetting"]["tasks"]) if "forgetting" in results else [],
        "answers": dict(_answers(run_dir, results["learned"], last)),
        "general": dict(_answers(run_dir, dict.fromkeys(general), last)),
        "engines": sorted({engine for served in results.get("served", []) for engine in served["engines"]}),
        "train_seconds": _train_seconds(costs),
        "peak_bytes": max((cost["peak_host_bytes"] for cost in costs), default=None),
        "state_bytes": sum(file.stat().st_size for file in folder.glob("*")),
        "hashes": _hashes(results),
        "versions": results["versions"],
    }


def read_records(folder: Path) -> list[Record]:
    """The records of a board, `<base>/<method>/<order>-seed-<n>.json` in `folder`. Raises `InputError`."""
    records = [cast(Record, read_json(path)) for path in sorted(folder.glob("*/*/*.json"))]
    for path, record in zip(sorted(folder.glob("*/*/*.json")), records, strict=True):
        found = record.get("schema_version") if isinstance(record, dict) else None
        if found != SCHEMA_VERSION:
            problem = f"has schema version {found}, expected {SCHEMA_VERSION}"
            raise InputError(problem, where=path, remedy="Delete the file, and run the board again")
    return records


def _train_seconds(costs: Sequence[StageCost]) -> float | None:
    """See `Record.train_seconds`; None where a stage does not say."""
    hours = [cost["gpu_hours"] or cost.get("processor_hours") for cost in costs]
    known = [one for one in hours if one is not None]
    return round(sum(known) * 3600, 1) if known and len(known) == len(hours) else None


def _hashes(results: Results) -> dict[str, Any]:
    """Of the recipe and the policies, shortened: they say whether two runs are one."""
    policies = [policy and policy[:12] for policy in results["hashes"]["policies"]]
    return {"recipe": (results["hashes"]["recipe"] or "")[:12], "policies": policies}


def _answers(run_dir: Path, learned: Mapping[str, int | None], last: int) -> Iterator[tuple[str, Answers]]:
    """The answers of each task that can be kept so."""
    for task, first in learned.items():
        cells = [_letters(run_dir / "predictions" / f"{k:02d}" / f"{task}.jsonl") for k in (first or last, last)]
        (then, chance), (now, other) = (cell or (None, None) for cell in cells)
        if now and then and chance == other:
            test = read_task(run_dir / "data" / task)["test_hash"][:12]
            yield task, {"test": test, "chance": chance, "learned": then if first else None, "last": now}


def _letters(file: Path) -> tuple[str, float | None] | None:
    """A cell's answers, and the chance of a guess.

    None where there is more to say of an answer than right or wrong, where questions share images, or where chance or
    whether there is a form differs between them.
    """
    rows = read_jsonl(file) if file.exists() else []
    chances = {row.get("chance") for row in rows}
    images = image_clusters(row["image_id"] for row in rows)
    if len(chances) != 1 or len(set(images)) < len(rows) or not all(map(_is_binary, rows)):
        return None
    [chance] = chances
    return "".join(_letter(row, chance is not None) for row in rows), chance


def _is_binary(row: Mapping[str, Any]) -> bool:
    return row["score"] in (0, 100) and row["constrained_score"] in (0, 100, None)


def _letter(row: Mapping[str, Any], held: bool) -> str:
    letter = _FREE[0] if row["score"] else _FREE[1] if row["format_ok"] else _FREE[2]
    return letter.upper() if held and row["constrained_score"] else letter


def right(letters: Sequence[str]) -> list[float]:
    """The score of each answer, 0 or 100."""
    return [100.0 * (letter in "rR") for letter in letters]


def as_row(letter: str, chance: float) -> dict[str, Any]:
    """An answer as `mcit.eval.forgetting` reads it."""
    score, known = 100.0 * (letter in "rR"), 100.0 * letter.isupper()
    return {"score": score, "format_ok": letter not in "nN", "constrained_score": known, "chance": chance}
