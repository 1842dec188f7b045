"""From a response to its score and verdict, from scored rows to a cell of the matrix."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from mcit.data_prep.errors import InputError
from mcit.data_prep.forms import final_answer
from mcit.data_prep.prepare import iter_samples, read_task
from mcit.data_prep.schema import PreparedTask, Sample, Style
from mcit.data_prep.styles import closed_form, extract, parse, split_reasoning

from .scorers import Scorer, get_scorer, scorer_identity
from .stats import clustered_stderr, image_clusters, mean
from .text import plain

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
    score: float  # 0–100; 0 when the form is wrong, except under a protocol
    format_ok: bool  # finished, with the reasoning asked for, and in the style asked for
    content_ok: bool  # right, whatever its form: reaches the scorer's `right_from`
    content_score: float  # 0–100: the score of what it says, whatever its form; never less than `score`
    verdict: Verdict
    think: str | None  # the reasoning, if there is any


class Cell(TypedDict):
    """One cell of the matrix: a task under the policy of a stage."""

    n: int
    score: float  # 0–100: the mean, or the scorer's own of a whole set
    stderr: float | None  # of the mean, clustered by image
    verdicts: dict[Verdict, float]  # shares, summing to 1


class _Reading(NamedTuple):
    """What an answer says, read in two ways."""

    strict: str | None  # its value where it has the form asked for
    loose: str | None  # its value whatever its form
    form_ok: bool
    reasoning_ok: bool
    think: str | None


def score_response(sample: Sample, response: str, scorer: Scorer, finished: bool = True) -> Score:
    """Score `response` to `sample` under the style asked for, and tell wrong form from wrong content.

    An answer is `correct` exactly when its score reaches `scorer.right_from`. So where an answer passes for the style
    asked for but is right only in the style-free reading ("The digit is 7" as a phrase), its form is what is wrong. An
    answer that was cut off (`finished` False) has no form; free text has no other form to lose. A bare "No" or "B" is a
    word, but not what a question for a word asks for, unless a reference is of that form too. What is a reference to
    the letter has the form.

    A published protocol takes the response as it is: its score, and what it calls right, stand whatever the form.
    """
    references = sample["references"]
    if not references:
        raise InputError("has no references, so nothing can be scored", field=f"sample {sample['id']}")
    read = _read(sample, response)
    has_form = finished and read.reasoning_ok and read.form_ok
    if scorer.whole:
        parsed: str | None = _ends(response, _LONGEST_RESPONSE).strip()
        score = scorer.score(parsed, references, sample)
        format_ok, content, content_ok = has_form, score, score >= scorer.right_from
    else:
        strict = scorer.score(read.strict, references, sample) if read.form_ok else 0.0
        same = read.form_ok and read.loose == read.strict
        loose = strict if same else scorer.score(read.loose, references, sample)
        content = max(strict, loose)
        right, content_ok = strict >= scorer.right_from, content >= scorer.right_from
        format_ok = has_form and right == content_ok
        parsed, score = (read.strict, strict) if format_ok else (read.loose, 0.0)
    return {
        "parsed": parsed,
        "score": score,
        "format_ok": format_ok,
        "content_ok": content_ok,
        "content_score": content,
        "verdict": VERDICTS[format_ok, content_ok],
        "think": read.think,
    }


def _read(sample: Sample, response: str) -> _Reading:
    style, references = sample["style"], sample["references"]
    options = (sample.get("meta") or {}).get("options")
    think, answer, reasoning_ok = split_reasoning(_ends(response, _LONGEST_RESPONSE), sample["reasoning"])
    answer = answer if style in _FREE_TEXT else _ends(answer, _LONGEST_ANSWER)
    value, form_ok = parse(style, answer, options=options)
    if any(answer.strip() == reference.strip() for reference in references) or _is_said(style, answer, references):
        value, form_ok = answer.strip(), True  # "The World Is Flat" looks like a sentence, and is a title
    if style == "short" and form_ok and (form := closed_form(answer)):
        form_ok = any(closed_form(reference.upper()) == form for reference in references)
    loose = value if form_ok and style in _FREE_TEXT else extract(style, answer, options=options)
    return _Reading(value, loose, form_ok, reasoning_ok, think)


def _is_said(style: Style, answer: str, references: Sequence[str]) -> bool:
    """Whether a short answer as a whole is a reference, whatever it looks like."""
    return style == "short" and plain(answer) in map(plain, references)


def scorers_of(task: PreparedTask) -> list[str]:
    """What a task is scored and rewarded by, with the code of a user's own functions. Raises `InputError`."""
    names = {task["scorer"]} | ({task["reward"]} - {"same"})
    for name in names:
        try:
            get_scorer(name)
        except InputError as error:
            raise InputError(str(error), where=f"stream.{task['name']}") from None
    return [task["scorer"], task["reward"], *sorted(scorer_identity(name) for name in names if ":" in name)]


def score_gold(sample: Sample, scorer: Scorer) -> Score:
    """What a sample's own answer is worth, without its thinking: data of a reasoning task need not have rationales."""
    return score_response({**sample, "reasoning": "none"}, final_answer(sample["completion"]), scorer)


def check_gold(folder: Path) -> list[str]:
    """Whether a prepared task's own answers would be scored as right: notes on the first few hundred of its test part.

    Raises `InputError` where more than half are not, since no policy could do better. Built-in kinds call a reference
    to the letter right: this is about scorers of the user's own, and answers that are not among the references.
    """
    task, rows, wrong = read_task(folder), list(islice(iter_samples(folder, "test"), _GOLD)), []
    scorer = get_scorer(task["scorer"]).for_corpus([sample["references"] for sample in rows])
    for sample in rows:
        if (score := score_gold(sample, scorer))["verdict"] != "correct":
            answer = final_answer(sample["completion"])
            wrong.append(f"sample {sample['id']}, {answer[:60]!r}: {score['verdict']}")
    problem = f"{len(wrong)} of {len(rows)} gold answers of the test part are not right for the scorer {task['scorer']}"
    if len(wrong) > len(rows) / 2:
        remedy = f"Name another `scorer:` or `style:` (it is {task['style']})"
        raise InputError(problem, where=task["name"], field=wrong[0], remedy=remedy)
    return [f"{task['name']}: {problem}; the first: {wrong[0]}"] if wrong else []


def score_bare(sample: Sample, response: str, scorer: Scorer) -> tuple[str | None, float]:
    """What a response that was asked for in no form says, as the scorer reads it, and what that is worth, 0–100."""
    if scorer.whole:
        parsed: str | None = _ends(response, _LONGEST_RESPONSE).strip()
    else:
        answer = split_reasoning(_ends(response, _LONGEST_RESPONSE), sample["reasoning"])[1]
        answer = answer if scorer.reads in (*_FREE_TEXT, None) else _ends(answer, _LONGEST_ANSWER)
        options = (sample.get("meta") or {}).get("options")
        if scorer.reads is None or _is_said(scorer.reads, answer, sample["references"]):
            parsed = answer
        else:
            parsed = extract(scorer.reads, answer, options=options)
    return parsed, scorer.score(parsed, sample["references"], sample)


def _ends(text: str, limit: int) -> str:
    """`text`, or where it is longer than `limit` its first and last `limit` / 2 characters, a line apart."""
    return text if len(text) <= limit else f"{text[: limit // 2]}\n…\n{text[-(limit // 2) :]}"


def aggregate(rows: Sequence[Mapping[str, Any]], scorer: Scorer | None = None) -> Cell:
    """Score, standard error and verdict shares of rows with `score`, `verdict` and, maybe, `image_id`.

    `scorer` is theirs: see `set_score`. Raises `InputError` for no rows.
    """
    if not rows:
        raise InputError("nothing to average: no answers were scored")
    counts = Counter(row["verdict"] for row in rows)
    score, stderr = set_score(rows, scorer)
    shares = {verdict: counts[verdict] / len(rows) for verdict in VERDICTS.values()}
    return {"n": len(rows), "score": score, "stderr": stderr, "verdicts": shares}


def set_score(rows: Sequence[Mapping[str, Any]], scorer: Scorer | None = None) -> tuple[float, float | None]:
    """The score of a test set, and its standard error, clustered by image: the mean over its rows.

    Rows with one `image_id` form a cluster; a row without (or with None) is its own. Where the scorer's score of a set
    is no mean, it is that score, which depends on `parsed` and `references` of all rows, and no error is known.
    """
    if scorer and scorer.pooled:
        answers = [(row["parsed"] or "") if scorer.whole or row.get("format_ok", True) else "" for row in rows]
        return scorer.pooled(answers, [row["references"] for row in rows]), None
    scores = [row["score"] for row in rows]
    return mean(scores), clustered_stderr(scores, image_clusters(row.get("image_id") for row in rows))
