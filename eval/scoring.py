"""From a response to its score and verdict, from scored rows to a cell of the matrix."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_jsonl
from mcit.data_prep.prepare import read_samples, read_task
from mcit.data_prep.readers import iter_jsonl
from mcit.data_prep.schema import PreparedTask, Reasoning, Sample, Style
from mcit.data_prep.styles import closed_form, extract, parse, split_reasoning

from .scorers import Scorer, get_scorer, scorer_identity
from .stats import clustered_stderr, image_clusters, mean

Verdict = Literal["correct", "wrong_content", "wrong_format", "wrong_both"]
VERDICTS: dict[tuple[bool, bool], Verdict] = {  # (format_ok, content_ok)
    (True, True): "correct",
    (True, False): "wrong_content",
    (False, True): "wrong_format",
    (False, False): "wrong_both",
}
_FREE_TEXT = ("brief", "detailed", "caption")
# A policy that lost its way repeats itself until it is cut off. Of such a flood the ends are read, since the patterns
# that find an answer in prose need not be linear. In characters.
_LONGEST_RESPONSE = 100_000
_LONGEST_ANSWER = 10_000
_GOLD = 500  # gold answers scored before training


class Score(TypedDict):
    """What one response is worth."""

    parsed: str | None  # the answer that was judged: as the style asks if it has that form, else the style-free reading
    score: float  # 0–100; 0 when the form is wrong
    format_ok: bool  # finished, with the reasoning asked for, and in the style asked for
    content_ok: bool  # right, whatever its form: reaches the scorer's `right_from`
    verdict: Verdict
    think: str | None  # the reasoning, if there is any


class Cell(TypedDict):
    """One cell of the matrix: a task under the policy of a stage."""

    n: int
    score: float  # mean, 0–100
    stderr: float | None  # of the mean, clustered by image
    verdicts: dict[Verdict, float]  # shares, summing to 1


def score_response(sample: Sample, response: str, scorer: Scorer, finished: bool = True) -> Score:
    """Score `response` to `sample` under the style asked for, and tell wrong form from wrong content.

    An answer is `correct` exactly when its score reaches `scorer.right_from`. So where an answer passes for the style
    asked for but is right only in the style-free reading ("The digit is 7" as a phrase), its form is what is wrong. An
    answer that was cut off (`finished` False) has no form; free text has no other form to lose. A bare "No" or "B" is a
    word, but not what a question for a word asks for, unless a reference is of that form too. What is a reference to
    the letter has the form.
    """
    references, style = sample["references"], sample["style"]
    if not references:
        raise InputError("has no references, so nothing can be scored", field=f"sample {sample['id']}")
    options = (sample.get("meta") or {}).get("options")
    think, answer, reasoning_ok = split_reasoning(_ends(response, _LONGEST_RESPONSE), sample["reasoning"])
    answer = answer if style in _FREE_TEXT else _ends(answer, _LONGEST_ANSWER)
    value, style_ok = parse(style, answer, options=options)
    if any(answer.strip() == reference.strip() for reference in references):
        value, style_ok = answer.strip(), True  # "The World Is Flat" looks like a sentence, and is a title
    if style == "short" and style_ok and (form := closed_form(answer)):
        style_ok = any(closed_form(reference) == form for reference in references)
    reading = value if style_ok and style in _FREE_TEXT else extract(style, answer, options=options)
    strict = scorer.score(value, references, sample) if style_ok else 0.0
    loose = strict if style_ok and reading == value else scorer.score(reading, references, sample)
    right, content_ok = strict >= scorer.right_from, max(strict, loose) >= scorer.right_from
    format_ok = finished and reasoning_ok and style_ok and right == content_ok
    return {
        "parsed": value if format_ok else reading,
        "score": strict if format_ok else 0.0,
        "format_ok": format_ok,
        "content_ok": content_ok,
        "verdict": VERDICTS[format_ok, content_ok],
        "think": think,
    }


def scorers_of(task: PreparedTask) -> list[str]:
    """What a task is scored and rewarded by, with the code of a user's own functions. Raises `InputError`."""
    names = {task["scorer"]} | ({task["reward"]} - {"same"})
    for name in names:
        try:
            get_scorer(name)
        except InputError as error:
            raise InputError(str(error), where=f"stream.{task['name']}") from None
    return [task["scorer"], task["reward"], *sorted(scorer_identity(name) for name in names if ":" in name)]


def check_gold(folder: Path) -> list[str]:
    """Whether a prepared task's own answers would be scored as right: notes on the first few hundred of its test part.

    Raises `InputError` where more than half are not, since no policy could do better. Built-in kinds call a reference
    to the letter right: this is about scorers of the user's own, and answers that are not among the references.
    """
    task, rows = read_task(folder), read_samples(folder, "test")[:_GOLD]
    scorer, wrong = get_scorer(task["scorer"]), []
    for sample in rows:
        # The answer alone: a test set of a reasoning task need not come with rationales.
        answer = split_reasoning(sample["completion"][-1]["content"], "think")[1]
        bare: Sample = {**sample, "reasoning": "none"}
        if (score := score_response(bare, answer, scorer))["verdict"] != "correct":
            wrong.append(f"sample {sample['id']}, {answer[:60]!r}: {score['verdict']}")
    problem = f"{len(wrong)} of {len(rows)} gold answers of the test part are not right for the scorer {task['scorer']}"
    if len(wrong) > len(rows) / 2:
        remedy = f"Name another `scorer:` or `style:` (it is {task['style']})"
        raise InputError(problem, where=task["name"], field=wrong[0], remedy=remedy)
    return [f"{task['name']}: {problem}; the first: {wrong[0]}"] if wrong else []


def _ends(text: str, limit: int) -> str:
    """`text`, or where it is longer than `limit` its first and last `limit` / 2 characters, a line apart."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\n…\n{text[-(limit // 2) :]}"


def aggregate(rows: Sequence[Mapping[str, Any]]) -> Cell:
    """Mean, clustered standard error and verdict shares of rows with `score`, `verdict` and, maybe, `image_id`.

    Rows with one `image_id` form a cluster; a row without (or with None) is its own. Raises `InputError` for no rows.
    """
    if not rows:
        raise InputError("nothing to average: no answers were scored")
    scores = [row["score"] for row in rows]
    counts = Counter(row["verdict"] for row in rows)
    return {
        "n": len(rows),
        "score": mean(scores),
        "stderr": clustered_stderr(scores, image_clusters(row.get("image_id") for row in rows)),
        "verdicts": {verdict: counts[verdict] / len(rows) for verdict in VERDICTS.values()},
    }


# --- Predictions made elsewhere -------------------------------------------------------------------------------------


class Prediction(BaseModel):
    """One line of a predictions file. Other keys are kept and reach a user's scorer."""

    model_config = ConfigDict(extra="allow", strict=True)

    id: str | int
    response: str
    references: list[str] = Field(min_length=1)
    options: list[str] | None = None  # the option texts of an mcq, in letter order
    style: Style | None = None  # the form that was asked for; None: none was, and content alone counts
    reasoning: Reasoning = "none"
    image_id: str | int | None = None
    finished: bool = True


class FileScore(TypedDict):
    """What `mcit score` prints."""

    kind: str
    score: float  # mean, 0–100
    n: int
    stderr: float | None  # clustered by image_id
    verdicts: NotRequired[dict[Verdict, float]]  # when every line states its style


def score_file(kind: str, path: Path | str, per_sample: Path | str | None = None) -> FileScore:
    """Score a JSONL file of predictions (`id`, `response`, `references`; see `Prediction`) with the scorer `kind`.

    A line that states the `style` asked for is scored as in a run: in the wrong form it gets 0. A line that does not is
    scored by its style-free reading, in the style the kind is about. `per_sample` gets each line with its score. Every
    line counts, answered or not. Raises `InputError` with the number of a bad line, and for an id that occurs twice.
    """
    scorer = get_scorer(kind)
    rows = []
    for row in _predictions(Path(path)):
        sample = cast(Sample, {**row, "meta": {"options": row["options"], "image_id": row["image_id"]}})
        if row["style"]:
            rows.append({**row, **score_response(sample, row["response"], scorer, row["finished"])})
        else:
            answer = split_reasoning(_ends(row["response"], _LONGEST_RESPONSE), row["reasoning"])[1]
            answer = answer if scorer.reads in (*_FREE_TEXT, None) else _ends(answer, _LONGEST_ANSWER)
            parsed = extract(scorer.reads, answer, options=row["options"]) if scorer.reads else answer
            score = scorer.score(parsed, row["references"], sample)
            rows.append({**row, "parsed": parsed, "score": score, "content_ok": score >= scorer.right_from})
    if not rows:
        raise InputError("holds no predictions", where=path)
    if per_sample:
        write_jsonl(per_sample, rows)
    scores = [row["score"] for row in rows]
    stderr = clustered_stderr(scores, image_clusters(row["image_id"] for row in rows))
    result = FileScore(kind=kind, score=mean(scores), n=len(rows), stderr=stderr)
    if all(row["style"] for row in rows):
        result["verdicts"] = aggregate(rows)["verdicts"]
    return result


def _predictions(path: Path) -> Iterator[dict[str, Any]]:
    """The validated lines of a predictions file; blank ones are skipped."""
    if not path.is_file():
        raise InputError("no such file", where=path)
    lines: dict[str, str] = {}
    for where, value in iter_jsonl(path):
        try:
            row = Prediction.model_validate(value).model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(first["msg"], where=where, field=".".join(map(str, first["loc"]))) from None
        first_line = lines.setdefault(str(row["id"]), where)
        if first_line != where:
            raise InputError(f"{row['id']!r} stands in {first_line} too", where=where, field="id")
        yield row
