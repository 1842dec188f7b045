"""A cell of the matrix on disk: what it depends on, the answers kept so far, and its scores, complete or absent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files, hash_json, read_json, write_json, write_jsonl
from mcit.data_prep.prepare import read_samples, read_task
from mcit.data_prep.schema import PreparedTask, Sample

from .asking import Asking, Kind, Questions
from .config import EvalConfig
from .engines.base import Policy, read_policy
from .scorers import get_scorer, scorer_identity
from .scoring import aggregate
from .sheet import score_sheet, summaries

_ANSWERS = 1  # raised when the same request would get another answer from this code


@dataclass(eq=False)
class Cell:
    """One task under the policy of one stage: the ways in which it is asked, with the answers there are so far."""

    stage: int
    policy: Policy
    folder: Path  # RUN/data/<task>
    task: PreparedTask
    predictions: Path  # RUN/predictions/<kk>
    askings: list[Asking]  # the first is the question as it is
    fingerprint: str  # what the scores depend on
    pictured: int  # samples that are asked without their images
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def marker(self) -> Path:
        return self.predictions / f"{self.task['name']}.done.json"

    @property
    def rows(self) -> Path:
        return self.predictions / f"{self.task['name']}.jsonl"

    @property
    def is_complete(self) -> bool:
        """Whether everything that is asked has an answer."""
        return all(asking.is_complete for asking in self.askings)

    @property
    def held(self) -> Asking | None:
        """The questions that are asked again with their answers held to a form."""
        return next((asking for asking in self.askings if asking.kind == "constrained"), None)

    def is_done(self) -> bool:
        """Whether its scores are there and still valid."""
        marker = read_json(self.marker) if self.marker.exists() else {}
        return self.rows.exists() and marker.get("fingerprint") == self.fingerprint


def load_cell(run_dir: Path, stage: int, task: str, config: EvalConfig) -> Cell:
    """A cell and its fingerprints, from the run's files. Raises `InputError` where they are missing."""
    folders = sorted((run_dir / "stages").glob(f"{stage:02d}-*/serving.json"))
    if len(folders) != 1:
        problem = "has not been trained yet" if not folders else "has more than one folder"
        raise InputError(problem, where=run_dir / "stages", field=f"stage {stage}")
    policy, folder = read_policy(folders[0].parent), run_dir / "data" / task
    info, predictions = read_task(folder), run_dir / "predictions" / f"{stage:02d}"
    keys = _answers_keys(policy, info, config)
    askings = [Asking(kind, key, _partial(predictions, task, kind)) for kind, key in keys.items()]
    scores = {"answers": list(keys.values()), "scorer": scorer_identity(info["scorer"]), "code": _scoring_code()}
    return Cell(stage, policy, folder, info, predictions, askings, hash_json(scores), config.image_probe or 0)


def _answers_keys(policy: Policy, task: PreparedTask, config: EvalConfig) -> dict[Kind, str]:
    """How a task is asked, with what the answers depend on each time."""
    options = config.model_dump(include={"engine", "max_new_tokens", "max_model_len"})
    known = {
        "version": _ANSWERS,
        "policy": policy.serving.model_dump(include={"kind", "hash", "base_hash", "dtype", "processor"}),
        "data": task["test_hash"],
        "options": options,
    }
    keys: dict[Kind, str] = {"free": hash_json(known)}
    if task["name"] in [general.name for general in config.general]:
        keys["gold"] = hash_json({**known, "asked": "gold"})
    elif config.constrained:
        form = {"choices": task.get("choices"), "code": _constraints_code()}
        keys["constrained"] = hash_json({**known, "asked": "constrained", **form})
    if config.image_probe:
        for kind in ("swapped", "blank"):
            keys[kind] = hash_json({**known, "asked": kind, "samples": config.image_probe})
    return keys


def _partial(predictions: Path, task: str, kind: Kind) -> Path:
    """Where unfinished answers lie. No task's name holds a `+`."""
    return predictions / (f"{task}.partial.jsonl" if kind == "free" else f"{task}+{kind}.partial.jsonl")


@lru_cache(maxsize=1)
def _constraints_code() -> str:
    return hash_files([Path(__file__).parent / "constraints.py"], Path(__file__).parent)


@lru_cache(maxsize=1)
def _scoring_code() -> str:
    """The identity of the code that scores. Scoring again costs nothing, since answers are kept apart from scores."""
    folder = Path(__file__).parent
    names = ("scorers.py", "scoring.py", "sheet.py", "constraints.py", "forgetting.py", "stats.py", "text.py")
    families = [path for name in ("kinds", "protocols") for path in (folder / name).glob("*.py")]
    reading = [folder.parent / "data_prep" / name for name in ("styles.py", "answers.py", "extraction.py")]
    return hash_files([*(folder / name for name in names), *families, *reading], folder)


def resume(cell: Cell, cache: Path) -> None:
    """Read a cell's samples, and the answers that it or another run with the same policy, data and options has got."""
    cell.samples = _samples(cell)
    questions = Questions(cell.samples, cell.folder, cell.task, cell.policy, cache / "blank")
    for asking in cell.askings:
        asking.requests = questions.requests(asking.kind, cell.pictured)
        asking.resume(cache)


def finish(cell: Cell, cache: Path) -> float:
    """Score a complete cell, write its files, the marker last, and return the score."""
    scorer = get_scorer(cell.task["scorer"]).for_corpus([sample["references"] for sample in cell.samples])
    answers = {asking.kind: asking.answers for asking in cell.askings}
    rows = score_sheet(cell.samples, answers, scorer, cell.task.get("choices"))
    cell.marker.unlink(missing_ok=True)
    write_jsonl(cell.rows, rows)
    for asking in cell.askings:
        asking.keep(cache)
    cell_score = aggregate(rows, scorer)
    marker: dict[str, Any] = {
        "fingerprint": cell.fingerprint,
        **cell_score,
        **summaries(rows, scorer, list(answers)),
        "policy_hash": cell.policy.serving.hash,
        "data_hash": cell.task["test_hash"],
        "engine": cell.askings[0].engine,
        "log_prob_gap": _log_prob_gap(cell),
        "seconds": round(cell.seconds, 3),
    }
    write_json(cell.marker, marker)
    for asking in cell.askings:
        asking.partial.unlink(missing_ok=True)
    return cell_score["score"]


def _log_prob_gap(cell: Cell) -> float | None:
    """Between the engine and the adapter on the base in transformers, the largest that the proof of liveness found."""
    path = cell.policy.folder / "liveness.json"
    proof = read_json(path) if path.exists() else {}
    of_this = (proof.get("hash"), proof.get("engine")) == (cell.policy.serving.hash, cell.askings[0].engine)
    return proof.get("gap_max") if of_this else None


def _samples(cell: Cell) -> list[Sample]:
    samples = read_samples(cell.folder, "test")
    if not samples:
        raise InputError("the test part is empty", where=cell.folder)
    if len({sample["id"] for sample in samples}) < len(samples):
        raise InputError("an id occurs twice in the test part", where=cell.folder)
    return samples


def needed_cells(
    which: str, stages: int, learned: Mapping[str, int], general: tuple[str, ...] = ()
) -> list[tuple[int, str]]:
    """The cells (stage, task) that `eval.cells` asks for; stage 0 is the base, `learned` the stage of each task.

    `full`: all. `seen`: what has been learned by each stage. `last`: the last row. `metrics`: row 0, what has been
    learned, and each task just before the stage that learns it, which is all that the metrics read. The tasks of
    `general` are asked at every stage of which anything is.
    """

    def needed(k: int, first: int) -> bool:
        seen = 0 < first <= k
        return {"full": True, "seen": seen, "last": k == stages, "metrics": k == 0 or seen or k == first - 1}[which]

    cells = [(k, task) for k in range(stages + 1) for task, first in learned.items() if needed(k, first)]
    rows = sorted({k for k, _ in cells})
    return [*cells, *((k, task) for k in rows for task in general)]
