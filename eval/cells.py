"""A cell of the matrix on disk: what it depends on, the answers kept so far, and its scores, complete or absent."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files, hash_json, read_json, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_samples, read_task
from mcit.data_prep.schema import PreparedTask, Sample

from .config import EvalConfig
from .engines.base import Policy, Request, read_policy
from .scorers import get_scorer, scorer_identity
from .scoring import aggregate, score_response

_ANSWERS = 1  # raised when the same request would get another answer from this code


@dataclass(eq=False)
class Cell:
    """One task under the policy of one stage, and the answers there are so far, by sample id."""

    stage: int
    policy: Policy
    folder: Path  # RUN/data/<task>
    task: PreparedTask
    predictions: Path  # RUN/predictions/<kk>
    answers_key: str  # what the answers depend on
    fingerprint: str  # what the scores depend on
    samples: list[Sample] = field(default_factory=list)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: str | None = None  # that gave the answers
    seconds: float = 0.0

    @property
    def marker(self) -> Path:
        return self.predictions / f"{self.task['name']}.done.json"

    @property
    def rows(self) -> Path:
        return self.predictions / f"{self.task['name']}.jsonl"

    @property
    def partial(self) -> Path:
        return self.predictions / f"{self.task['name']}.partial.jsonl"

    @property
    def is_complete(self) -> bool:
        """Whether every sample has an answer."""
        return len(self.answers) == len(self.samples)

    def is_done(self) -> bool:
        """Whether its scores are there and still valid."""
        marker = read_json(self.marker) if self.marker.exists() else {}
        return self.rows.exists() and marker.get("fingerprint") == self.fingerprint

    def request(self, sample: Sample) -> Request:
        """A sample as a question to this cell's policy. The completion is what `logprobs` would score."""
        images = [image_path(self.folder, self.task, name) for name in sample["images"]]
        return Request(sample["prompt"], images, self.policy, sample["completion"][0]["content"])


def load_cell(run_dir: Path, stage: int, task: str, config: EvalConfig) -> Cell:
    """A cell and its fingerprints, from the run's files. Raises `InputError` where they are missing."""
    folders = sorted((run_dir / "stages").glob(f"{stage:02d}-*/serving.json"))
    if len(folders) != 1:
        problem = "has not been trained yet" if not folders else "has more than one folder"
        raise InputError(problem, where=run_dir / "stages", field=f"stage {stage}")
    policy, folder = read_policy(folders[0].parent), run_dir / "data" / task
    info = read_task(folder)
    serving = policy.serving
    answers = {
        "version": _ANSWERS,
        "policy": serving.model_dump(include={"kind", "hash", "base_hash", "dtype", "processor"}),
        "data": info["test_hash"],
        "options": config.model_dump(include={"engine", "max_new_tokens", "max_model_len"}),
    }
    answers_key = hash_json(answers)
    scores = {"answers": answers_key, "scorer": scorer_identity(info["scorer"]), "code": _scoring_code()}
    return Cell(stage, policy, folder, info, run_dir / "predictions" / f"{stage:02d}", answers_key, hash_json(scores))


@lru_cache(maxsize=1)
def _scoring_code() -> str:
    """The identity of the code that scores. Scoring again costs nothing, since answers are kept apart from scores."""
    folder = Path(__file__).parent
    files = [folder / name for name in ("scorers.py", "scoring.py", "stats.py", "text.py")]
    families = [path for name in ("kinds", "protocols") for path in (folder / name).glob("*.py")]
    reading = [folder.parent / "data_prep" / name for name in ("styles.py", "answers.py")]
    return hash_files([*files, *families, *reading], folder)


def resume(cell: Cell, cache: Path) -> None:
    """Read a cell's samples, and the answers that it or another run with the same policy, data and options has got."""
    cell.samples = _samples(cell)
    kept = _read_answers(_cached(cache, cell), cell)
    if not kept or len(kept[1]) < len(cell.samples):
        kept = _read_answers(cell.partial, cell) or kept
    cell.engine, cell.answers = kept or (None, {})


def open_partial(cell: Cell) -> TextIO:
    """The partial file, holding what is known already, open for more; each line is written at once."""
    write_jsonl(cell.partial, [{"fingerprint": cell.answers_key, "engine": cell.engine}, *cell.answers.values()])
    return open(cell.partial, "a", encoding="utf-8", buffering=1)


def finish(cell: Cell, cache: Path) -> float:
    """Score a complete cell, write its files, the marker last, and return the score."""
    scorer = get_scorer(cell.task["scorer"]).for_corpus([sample["references"] for sample in cell.samples])
    rows = []
    for sample in cell.samples:
        answer = cell.answers[sample["id"]]
        score = score_response(sample, answer["text"], scorer, answer["finished"])
        meta = sample.get("meta") or {}
        rows.append(
            {
                "id": sample["id"],
                "prompt": answer["prompt"],
                "response": answer["text"],
                "references": sample["references"],
                "style": sample["style"],
                "reasoning": sample["reasoning"],
                "options": meta.get("options"),
                "constrained_score": None,
                **score,
                "image_id": meta.get("image_id"),
                "finished": answer["finished"],
                "tokens": answer["tokens"],
            }
        )
    cell.marker.unlink(missing_ok=True)
    write_jsonl(cell.rows, rows)
    if not _cached(cache, cell).exists():
        answers = [cell.answers[sample["id"]] for sample in cell.samples]
        write_jsonl(_cached(cache, cell), [{"fingerprint": cell.answers_key, "engine": cell.engine}, *answers])
    cell_score = aggregate(rows, scorer)
    marker = {
        "fingerprint": cell.fingerprint,
        **cell_score,
        "policy_hash": cell.policy.serving.hash,
        "data_hash": cell.task["test_hash"],
        "engine": cell.engine,
        "seconds": round(cell.seconds, 3),
    }
    write_json(cell.marker, marker)
    cell.partial.unlink(missing_ok=True)
    return cell_score["score"]


def _samples(cell: Cell) -> list[Sample]:
    samples = read_samples(cell.folder, "test")
    if not samples:
        raise InputError("the test part is empty", where=cell.folder)
    if len({sample["id"] for sample in samples}) < len(samples):
        raise InputError("an id occurs twice in the test part", where=cell.folder)
    return samples


def _read_answers(path: Path, cell: Cell) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """The engine and the whole lines of an answers file that belongs to this cell; None if there is none."""
    if not path.exists():
        return None
    rows = list(_whole_lines(path))
    if not rows or rows[0].get("fingerprint") != cell.answers_key:
        return None
    wanted = {sample["id"] for sample in cell.samples}
    return rows[0]["engine"], {row["id"]: row for row in rows[1:] if row["id"] in wanted}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows up to the first that was cut off (by a kill, or a full disk)."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def _cached(cache: Path, cell: Cell) -> Path:
    return cache / "predictions" / f"{cell.answers_key}.jsonl"


def needed_cells(which: str, stages: int, learned: Mapping[str, int]) -> list[tuple[int, str]]:
    """The cells (stage, task) that `eval.cells` asks for; stage 0 is the base, `learned` the stage of each task.

    `full`: all. `seen`: what has been learned by each stage. `last`: the last row. `metrics`: row 0, what has been
    learned, and each task just before the stage that learns it, which is all that the metrics read.
    """

    def needed(k: int, first: int) -> bool:
        seen = 0 < first <= k
        return {"full": True, "seen": seen, "last": k == stages, "metrics": k == 0 or seen or k == first - 1}[which]

    return [(k, task) for k in range(stages + 1) for task, first in learned.items() if needed(k, first)]
