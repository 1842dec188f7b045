"""Scores of predictions that were made elsewhere, or in a run: what `mcit score` prints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_jsonl
from mcit.data_prep.readers import iter_jsonl
from mcit.data_prep.schema import Reasoning, Sample, Style

from .scorers import Scorer, get_protocol, get_scorer
from .scoring import Verdict, aggregate, score_bare, score_response, set_score


class Prediction(BaseModel):
    """One line of a predictions file. Other keys are kept, and reach a protocol or a user's scorer."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | int
    response: str
    references: list[str] = Field(min_length=1)
    options: list[str] | None = None  # the option texts of an mcq, in letter order; the labels of a label task
    style: Style | None = None  # the form that was asked for; None: none was, and content alone counts
    reasoning: Reasoning = "none"
    image_id: str | int | None = None
    finished: bool = True


class FileScore(TypedDict):
    """What `mcit score` prints."""

    kind: str
    protocol: NotRequired[str]
    score: float  # of the protocol if one is named, else of the kind; 0–100
    n: int
    stderr: float | None  # clustered by image_id; None where the score is no mean, or of one cluster
    kind_score: NotRequired[float]  # beside a protocol: the score of the kind
    verdicts: NotRequired[dict[Verdict, float]]  # when every line states its style


def score_file(
    kind: str,
    path: Path | str,
    *,
    protocol: str | None = None,
    samples: Path | str | None = None,
    per_sample: Path | str | None = None,
) -> FileScore:
    """Score a JSONL file of predictions (`id`, `response`, `references`; see `Prediction`) with the scorer `kind`.

    A line that states the `style` asked for is scored as in a run: in the wrong form it gets 0. A line that does not is
    scored by its style-free reading, in the style the kind is about. A published `protocol` takes either as it is.
    `samples` is the test part of a prepared task, whose references, style, options and images the lines then need not
    repeat; each of its samples must be answered. `per_sample` gets each line with its score. Every line counts,
    answered or not. Raises `InputError` with the number of a bad line, for an id that occurs twice, is no sample's or
    is missing, and for an unknown kind or protocol.
    """
    scorer, published = get_scorer(kind), get_protocol(protocol) if protocol else None
    lines = list(_predictions(Path(path), _read_samples(Path(samples)) if samples else None))
    if not lines:
        raise InputError("holds no predictions", where=path)
    rows = _scored(lines, published or scorer)
    score, stderr = set_score(rows, published or scorer)
    result = FileScore(kind=kind, score=score, n=len(rows), stderr=stderr)
    if published:
        of_kind = _scored(lines, scorer)
        rows = [{**row, "kind_score": other["score"]} for row, other in zip(rows, of_kind, strict=True)]
        result["protocol"], result["kind_score"] = published.name, set_score(of_kind, scorer)[0]
    if all(row["style"] for row in rows):
        result["verdicts"] = aggregate(rows)["verdicts"]
    if per_sample:
        _write(per_sample, rows)
    return result


def _scored(lines: list[dict[str, Any]], scorer: Scorer) -> list[dict[str, Any]]:
    """Each line with what it is worth."""
    scorer = scorer.for_corpus([line["references"] for line in lines])
    rows = []
    for line in lines:
        sample = cast(Sample, {**line, "meta": {"options": line["options"], "image_id": line["image_id"]}})
        if line["style"]:
            rows.append({**line, **score_response(sample, line["response"], scorer, line["finished"])})
        else:
            parsed, score = score_bare(sample, line["response"], scorer)
            rows.append({**line, "parsed": parsed, "score": score, "content_ok": score >= scorer.right_from})
    return rows


def _predictions(path: Path, samples: dict[str, dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    """The validated lines of a predictions file, with what `samples` says of them; blank ones are skipped."""
    if not path.is_file():
        raise InputError("no such file", where=path)
    found: dict[str, str] = {}
    for where, value in iter_jsonl(path):
        if samples is not None and isinstance(value, dict):
            value = {**value, **_sample_of(value, samples, where)}
        row = _checked(value, where)
        first = found.setdefault(str(row["id"]), where)
        if first != where:
            raise InputError(f"{row['id']!r} stands in {first} too", where=where, field="id")
        yield row
    if samples is not None and (unanswered := [name for name in samples if name not in found]):
        problem = f"{len(unanswered)} of {len(samples)} samples have no prediction, the first is {unanswered[0]!r}"
        raise InputError(problem, where=path, remedy="A sample without an answer is wrong: give it an empty response")


def _sample_of(value: dict[str, Any], samples: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    if str(value.get("id")) not in samples:
        raise InputError(f"{value.get('id')!r} is not among the samples", where=where, field="id")
    return samples[str(value["id"])]


def _checked(value: Any, where: str) -> dict[str, Any]:
    try:
        row = Prediction.model_validate(value).model_dump()
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=where, field=".".join(map(str, first["loc"]))) from None
    except ValueError as error:  # NaN, which Python reads, or half of a surrogate pair
        raise InputError(f"cannot be written again: {error}", where=where) from None
    return row


def _read_samples(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each sample of a prepared test part (`RUN/data/<task>/test.jsonl`), by id."""
    if not path.is_file():
        raise InputError("no such file", where=path)
    samples = {}
    for where, value in iter_jsonl(path):
        if not isinstance(value, dict) or not {"id", "references", "style"} <= value.keys():
            remedy = "Give the test part of a prepared task, RUN/data/<task>/test.jsonl"
            raise InputError("is no sample", where=where, remedy=remedy)
        known = {key: value[key] for key in ("references", "style", "reasoning", "images", "prompt") if key in value}
        meta = value.get("meta") or {}
        samples[str(value["id"])] = known | {key: meta[key] for key in ("options", "image_id") if key in meta}
    return samples


def _write(path: Path | str, rows: list[dict[str, Any]]) -> None:
    try:
        write_jsonl(path, rows)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=path) from error
