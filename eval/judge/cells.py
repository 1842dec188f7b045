"""A judged cell on disk: the reasoning of one task after one stage, with its scores, complete or absent.

`RUN/judgements/<kk>/<task>.jsonl` has a line a sample beside `RUN/predictions/<kk>/<task>.jsonl`; `<task>.done.json`
is written last. A judge's replies are kept one by one as they come (`mcit.data_prep.endpoint`), so what was interrupted
asks only the rest and gives the same scores.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mcit.data_prep.endpoint import Picture
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_files, hash_json, read_json, read_jsonl, write_json, write_jsonl
from mcit.data_prep.prepare import image_path, read_images, read_samples, read_task
from mcit.data_prep.schema import PreparedTask, Sample

from ..asking import chosen
from ..config import JudgeConfig
from ..stats import clustered_stderr, image_clusters, mean
from .judges import Case, Judgement, Outcome, judge_identity, make_judge
from .rubrics import DIMENSIONS, Dimension

Row = dict[str, Any]


class JudgedCell(NamedTuple):
    """One task under the policy of one stage."""

    stage: int
    task: PreparedTask
    run: Path
    policy: str  # hash of what gave the answers
    judge: dict[str, Any]  # whose scores they are
    fingerprint: str  # what the scores depend on

    @property
    def rows(self) -> Path:
        """What was said of each sample."""
        return judgements(self.run, self.stage, self.task["name"])

    @property
    def marker(self) -> Path:
        """What completes it."""
        return self.rows.with_name(f"{self.task['name']}.done.json")

    def is_done(self) -> bool:
        """Whether its scores are there and still valid."""
        marker = read_json(self.marker) if self.marker.exists() else {}
        return self.rows.exists() and marker.get("fingerprint") == self.fingerprint


def judgements(run: Path, stage: int, task: str) -> Path:
    """The file with the judgements of a cell."""
    return run / "judgements" / f"{stage:02d}" / f"{task}.jsonl"


def reasons(task: PreparedTask) -> bool:
    """Whether a task asks for reasoning."""
    return task["reasoning"] == "think"


def judged_cells(run: Path, cells: Iterable[tuple[int, str]], config: JudgeConfig | str) -> list[JudgedCell]:
    """The cells (stage, task) whose task asks for reasoning. Raises `InputError` where one has no answers yet."""
    judge, found = judge_identity(config), []
    for stage, name in cells:
        task = read_task(run / "data" / name)
        if reasons(task):
            answers = _predictions(run, stage, name)
            if not answers.exists():
                raise InputError("has no answers yet", where=run, field=f"stage {stage}, {name}", remedy="`mcit eval`")
            policy = read_json(answers.with_name(f"{name}.done.json"))["policy_hash"]
            known = {"answers": hash_files([answers], run), "policy": policy, "data": task["test_hash"]}
            key = hash_json({**known, "judge": judge, "code": _code()})
            found.append(JudgedCell(stage, task, run, policy, judge, key))
    return found


def judge_cells(
    cells: Sequence[JudgedCell], config: JudgeConfig | str, cache: Path, show: Callable[[str], None]
) -> None:
    """Judge the cells, all at once, and write their files. Raises `InputError` where the judge cannot be used."""
    judge = make_judge(config, cache, show)
    sheets = [_Sheet(cell, config) for cell in cells]
    said = iter(judge.judge([case for sheet in sheets for case in sheet.cases.values()]))
    for sheet in sheets:
        sheet.write({name: next(said) for name in sheet.cases})


class _Sheet:
    """A cell with its samples and answers."""

    def __init__(self, cell: JudgedCell, config: JudgeConfig | str):
        self.cell = cell
        folder, name = cell.run / "data" / cell.task["name"], cell.task["name"]
        asked = [sample for sample in read_samples(folder, "test") if sample["reasoning"] == "think"]
        limit = config.samples if isinstance(config, JudgeConfig) else None
        self.samples = chosen(asked, limit) if limit else asked
        self.answers = {row["id"]: row for row in read_jsonl(_predictions(cell.run, cell.stage, name))}
        rubric = config.rubrics.get(name, "general") if isinstance(config, JudgeConfig) else ""
        images = read_images(folder) if any(sample["images"] for sample in self.samples) else {}

        def case(sample: Sample) -> Case:
            answer = self.answers[sample["id"]]
            pictures = [Picture(image_path(folder, cell.task, one), images[one].sha256) for one in sample["images"]]
            return Case(sample, tuple(pictures), answer["response"], answer["think"], rubric)

        self.cases = {sample["id"]: case(sample) for sample in self.samples if not self._unasked(sample)}

    def _unasked(self, sample: Sample) -> Outcome | None:
        """What is known without a judge: that no reasoning was given, or that it was cut off."""
        answer = self.answers[sample["id"]]
        if not answer["finished"] and "</think>" not in answer["response"]:
            return "cut"
        return None if answer["think"] else "absent"

    def write(self, said: dict[str, Judgement]) -> None:
        """The files of the cell, the marker last."""
        rows = [self._row(sample, said.get(sample["id"])) for sample in self.samples]
        self.cell.marker.unlink(missing_ok=True)
        write_jsonl(self.cell.rows, rows)
        cell = self.cell
        known = {"stage": cell.stage, "policy_hash": cell.policy, "data_hash": cell.task["test_hash"]}
        marker = {"fingerprint": cell.fingerprint, "judge": cell.judge, **known, **summary(rows)}
        write_json(self.cell.marker, marker)

    def _row(self, sample: Sample, said: Judgement | None) -> Row:
        outcome = said.outcome if said else self._unasked(sample)
        verdict = said.verdict if said else None
        scores: dict[Dimension, float] = verdict.scores if verdict else {}
        score = verdict.score if verdict else 0.0 if outcome == "absent" else None
        return {
            "id": sample["id"],
            "outcome": outcome,
            "score": score,
            **{name: scores.get(name) for name in DIMENSIONS},
            "remark": said.remark if said else "",
            "attempts": said.attempts if said else 0,
            "image_id": (sample.get("meta") or {}).get("image_id"),
        }


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Of a cell: mean score over what was judged or gave no reasoning, standard error, and what became of each sample.

    Reasoning that was cut off, and what the judge said nothing readable of, has no score and is counted. A dimension
    is averaged over the reasoning that there was, so that what was left out and what was wrong are not mixed up.
    """
    scored = [row for row in rows if row["score"] is not None]
    counts = Counter(row["outcome"] for row in rows)
    values = [row["score"] for row in scored]
    dimensions = {name: [row[name] for row in rows if row[name] is not None] for name in DIMENSIONS}
    return {
        "n": len(scored),
        "score": mean(values) if values else None,
        "stderr": clustered_stderr(values, image_clusters(row["image_id"] for row in scored)) if values else None,
        "dimensions": {name: mean(found) if found else None for name, found in dimensions.items()},
        "outcomes": {outcome: counts[outcome] for outcome in get_args(Outcome)},
    }


def _predictions(run: Path, stage: int, task: str) -> Path:
    return run / "predictions" / f"{stage:02d}" / f"{task}.jsonl"


@lru_cache(maxsize=1)
def _code() -> str:
    """The identity of the code that judges. Judging again costs nothing, since a model's replies are kept."""
    folder = Path(__file__).parent
    return hash_files(folder.glob("*.py"), folder)
