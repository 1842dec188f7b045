"""What an answer is worth: one scorer a kind, from 0 to 100.

A scorer gets the parsed answer (text, or None when nothing could be read), the accepted references and the sample. The
best of several references counts, an empty answer never scores, and an answer that is a reference to the letter gets
100. Scores are correct by default: they do not repeat the defects of published evaluation scripts.
"""

import difflib
import logging
import math
import re
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rapidfuzz.distance import LCSseq, Levenshtein

from mcit.data_prep.errors import InputError
from mcit.data_prep.readers import is_function, load_function, source_identity
from mcit.data_prep.schema import Sample, Style

from .text import latex_tokens, plain, same_number, to_number, vqa_answer

ScoreFunction = Callable[[str | None, list[str], Sample], float]
Match = Callable[[str, str, Sample], float]  # answer, one reference, sample → 0–1


@dataclass(frozen=True)
class Scorer:
    """A named score.

    `score(answer, references, sample)` is in 0–100; `right_from` is the score from which an answer counts as right in
    a verdict; `reads` is the style whose style-free extraction finds the answer in a response when nobody asked for a
    form (predictions made elsewhere); None takes the response as it is.
    """

    name: str
    score: ScoreFunction
    right_from: float
    reads: Style | None


def _best(match: Match) -> ScoreFunction:
    """The score of `match` against the best of the references."""

    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        if answer is None or not answer.strip():
            return 0.0
        if any(answer.strip() == reference.strip() for reference in references):
            return 100.0
        return 100.0 * max((float(match(answer, reference, sample)) for reference in references), default=0.0)

    return score


# --- Closed sets and short answers ----------------------------------------------------------------------------------

_LETTER = re.compile(r"[a-z]")
_LETTERED = re.compile(r"\(?([a-z])[.):]+\s")


def _option(text: str, options: list[str]) -> str:
    """The option that `text` names, as its lower-case letter if that can be told, else the text made comparable."""
    wanted = plain(text)
    if _LETTER.fullmatch(wanted):
        return wanted
    for letter, option in zip(string.ascii_lowercase, options, strict=False):
        if plain(option) == wanted:
            return letter
    lettered = _LETTERED.match(wanted)
    return lettered[1] if lettered else wanted


def _mcq(answer: str, reference: str, sample: Sample) -> float:
    """The same option, named by its letter ("B", "(b)", "B. three") or by its text (`meta.options`)."""
    options = sample.get("meta", {}).get("options") or []
    return _option(answer, options) == _option(reference, options)


def _yes_no(answer: str, reference: str, sample: Sample) -> float:
    """The same word; true counts as yes and false as no. Never a substring: "unknown" is not "no"."""
    same = {"true": "yes", "false": "no"}
    answer, reference = plain(answer), plain(reference)
    return same.get(answer, answer) == same.get(reference, reference)


def _short(answer: str, reference: str, sample: Sample) -> float:
    """Exact match up to case, spacing, surrounding punctuation and a leading article."""
    return plain(answer) == plain(reference)


def _vqa_soft(answer: str | None, references: list[str], sample: Sample) -> float:
    """VQA accuracy: for each annotator, min(1, matches among the others / 3), averaged (ten answers as a rule).

    Source: Antol et al. 2015 and the official evaluation code, in the EvalAI form. Fewer than four answers cannot
    reach 100 that way even when all agree; then matching any of them is right.
    """
    if answer is None or not answer.strip():
        return 0.0
    given = vqa_answer(answer)
    hits = [vqa_answer(reference) == given for reference in references]
    if len(hits) < 4:
        return 100.0 * any(hits)
    return 100.0 * sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def _anls(answer: str, reference: str, sample: Sample) -> float:
    """ANLS: 1 − edit distance / longer length, case- and space-insensitive; 0 when the distance reaches one half.

    Source: Biten et al. 2019 (ST-VQA), arXiv 1905.13648, threshold 0.5.
    """
    answer, reference = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    similarity = Levenshtein.normalized_similarity(answer, reference)
    return similarity if similarity > 0.5 else 0.0


# --- Numbers and mathematics ----------------------------------------------------------------------------------------


def _numeric(tolerance: float) -> Match:
    def match(answer: str, reference: str, sample: Sample) -> float:
        given, wanted = to_number(answer), to_number(reference)
        if given is None or wanted is None:
            return _short(answer, reference, sample)
        return same_number(given, wanted, tolerance)

    return match


logging.getLogger("math_verify").setLevel(logging.ERROR)  # it prints whole answers that it gave up on
_MATH_TAIL = 1_000  # characters; a final answer stands at the end, and parsing a flood would take minutes
_PROSE = re.compile(r"[^\W\d_]{3,}")
_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")


def _is_prose(text: str) -> bool:
    """Whether there is a word in `text` that is neither a LaTeX command nor a product of two variables."""
    return _PROSE.search(re.sub(r"\\[A-Za-z]+", "", text)) is not None


def _expressions(text: str, timeout: int | None) -> list[Any]:
    """What math-verify reads in `text`; text that is one bare formula is marked as such before."""
    from math_verify import parse  # sympy takes seconds to import, and most runs have no mathematics

    text = text[-_MATH_TAIL:]
    forms = [text, f"${text}$"]
    if not _DELIMITED.search(text) and not _is_prose(text):
        forms.reverse()
    return next((found for form in forms if (found := parse(form, parsing_timeout=timeout))), [])


def _math(answer: str, reference: str, sample: Sample) -> float:
    """Mathematical equality by math-verify ("1/2", "0.5", "\\frac12"); of words ("no solution"), that of `_short`."""
    from math_verify import verify

    if _is_prose(reference) and _short(answer, reference, sample):
        return 1.0
    # Its time limit is an alarm signal, which Python delivers to the main thread only. It is long, since no score may
    # depend on how busy the machine is.
    timeout = 10 if threading.current_thread() is threading.main_thread() else None
    wanted, given = _expressions(reference, timeout), _expressions(answer, timeout)
    return bool(wanted and given) and verify(wanted, given, timeout_seconds=timeout)


def _latex(answer: str, reference: str, sample: Sample) -> float:
    """1 − edit distance over LaTeX tokens / longer length (as for im2latex, Deng et al. 2017)."""
    return Levenshtein.normalized_similarity(latex_tokens(answer), latex_tokens(reference))


# --- Free text ------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]+")


def _rouge_l(answer: str, reference: str, sample: Sample) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin 2004), without stemming.

    Equal to the `rouge-score` package on ASCII text; that one drops every other letter, needs memory in proportion to
    the product of the lengths, and takes seconds to import.
    """
    given, wanted = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted)) if given and wanted else 0.0


def _caption(answer: str | None, references: list[str], sample: Sample) -> float:
    """Mean of ROUGE-L (best reference) and sentence BLEU-4 (sacreBLEU, all references, effective order), lower case.

    CIDEr weighs words by a whole corpus, METEOR and SPICE need Java: none is a score of one answer.
    """
    from sacrebleu.metrics.bleu import BLEU

    if answer is None or not answer.strip():
        return 0.0
    rouge = _best(_rouge_l)(answer, references, sample)
    bleu = BLEU(lowercase=True, effective_order=True).sentence_score(answer, references).score
    return (rouge + min(bleu, 100.0)) / 2


# --- Boxes ----------------------------------------------------------------------------------------------------------

_COORDINATE = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d*)?|\.\d+)")


def _box(text: str) -> list[float] | None:
    numbers = [float(found[0]) for found, _ in zip(_COORDINATE.finditer(text), range(4), strict=False)]
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _iou(answer: str, reference: str, sample: Sample) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2] in the same units.

    0 when a box is missing, or inverted: then it overlaps nothing.
    """
    given, wanted = _box(answer), _box(reference)
    if given is None or wanted is None:
        return 0.0
    if given == wanted:
        return 1.0
    sides = [(box[2] - box[0], box[3] - box[1]) for box in (given, wanted)]
    overlap = [max(0.0, min(given[at + 2], wanted[at + 2]) - max(given[at], wanted[at])) for at in (0, 1)]
    shared = overlap[0] * overlap[1]
    union = sum(width * height for width, height in sides) - shared
    return shared / union if union > 0 else 0.0


def _bbox(answer: str, reference: str, sample: Sample) -> float:
    """Right when IoU > 0.5, as in RefCOCO."""
    return _iou(answer, reference, sample) > 0.5


# `right_from` of graded scores: two of ten annotators for vqa_soft, ANLS's own threshold, one token in ten for LaTeX,
# half of the words in order for ROUGE-L; for captions, where BLEU-4 of a good one is about 30, a convention of ours.
SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (
        Scorer("mcq", _best(_mcq), 100, "mcq"),
        Scorer("yes_no", _best(_yes_no), 100, "yes_no"),
        Scorer("short", _best(_short), 100, "short"),
        Scorer("vqa_soft", _vqa_soft, 50, "short"),
        Scorer("anls", _best(_anls), 50, "short"),
        Scorer("relaxed", _best(_numeric(0.05)), 100, "short"),  # ChartQA (arXiv 2203.10244): 5 % on numbers
        Scorer("number", _best(_numeric(1e-9)), 100, "number"),
        Scorer("math", _best(_math), 100, None),
        Scorer("latex", _best(_latex), 90, "latex"),
        Scorer("rouge_l", _best(_rouge_l), 50, None),
        Scorer("caption", _caption, 30, "caption"),
        Scorer("bbox", _best(_bbox), 100, "bbox"),
        Scorer("iou", _best(_iou), math.nextafter(50, 100), "bbox"),  # mean IoU; right where bbox is
    )
}


def get_scorer(name: str) -> Scorer:
    """The scorer of a kind, or of `module:function`.

    A user's function gets `(response: str, references: list[str], sample: dict)` and returns 0–100; it is never asked
    about an empty answer; its attribute `right_from` (default 50) says from which score an answer is right.
    Raises `InputError` for an unknown name, and when the function fails or returns no such number.
    """
    if is_function(name):
        return _user_scorer(name)
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(SCORERS)}; or module:function"
        raise InputError(f"unknown scorer {name!r}", remedy=remedy)
    return SCORERS[name]


def scorer_identity(name: str) -> str:
    """What a fingerprint holds of a scorer: its name, and of a user's function its code too. Raises `InputError`."""
    return f"{name} {source_identity(name, Path.cwd())}" if is_function(name) else name


def _user_scorer(name: str) -> Scorer:
    function = load_function(name, Path.cwd())

    def score(answer: str | None, references: list[str], sample: Sample) -> float:
        if answer is None or not answer.strip():
            return 0.0
        where = f"scorer {name}: sample {sample.get('id', '?')}"
        try:
            value = float(function(answer, references, sample))
        except Exception as error:
            raise InputError(f"{type(error).__name__}: {error}", where=where) from error
        if not 0 <= value <= 100:
            raise InputError(f"returned {value}", where=where, remedy="A score lies between 0 and 100")
        return value

    return Scorer(name, score, float(getattr(function, "right_from", 50)), None)
