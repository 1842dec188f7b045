"""CoIN (arXiv 2403.08350), as its code scores: zackschen/CoIN @4122465, `ETrain/Eval/LLaVA/CoIN/eval_*.py`."""

import re

from mcit.data_prep.schema import Sample

from ..kinds.boxes import overlap
from ..kinds.vqa import agreement, normalise
from .base import missing, protocol

LETTERS = "ABCDE"
_FULL_STOPS = 32  # the value of re.UNICODE, which the evaluator passes where a count is expected


def option(letter: str, references: list[str], sample: Sample) -> bool:
    """Whether a letter is the right one. One beyond the question's options is none."""
    options = (sample.get("meta") or {}).get("options") or LETTERS
    return letter in LETTERS[: len(options)] and letter == references[0].strip()


def named_first(response: str) -> str | None:
    """The letter of a response that is one, or starts with one and ". "."""
    if len(response) == 1 and response in LETTERS:
        return response
    return response[0] if re.match(rf"[{LETTERS}]\. ", response) else None


def _scienceqa(response: str, references: list[str], sample: Sample) -> float:
    """The letter. Defect: failing that, the first word of one character is taken for it ("I see a dog": I)."""
    alone = re.search(r"\b(\w)\b", response)
    return option(named_first(response) or (alone[1].upper() if alone else ""), references, sample)


def _textvqa(response: str, references: list[str], sample: Sample) -> float:
    """VQA accuracy, correct but for slips of the normalisation; exactly ten answers are asked for."""
    if len(references) != 10:
        raise missing(sample, "references", f"TextVQA's evaluator wants ten answers, not {len(references)}")
    given, *wanted = (normalise(text, _FULL_STOPS) for text in (response, *references))
    return agreement(given, wanted)


def _imagenet(response: str, references: list[str], sample: Sample) -> float:
    """Right when either contains the other. Defect: so is an empty response, "a", or the names of all classes."""
    return response in references[0] or references[0] in response


def _gqa(response: str, references: list[str], sample: Sample) -> float:
    """Exact, in lower case, without full stops at the end."""
    return response.rstrip(".").lower() == references[0]


def exact(response: str, references: list[str], sample: Sample) -> float:
    """VizWiz, VQAv2: exact, whatever the case. Defect: with one answer, not ten people's, and without normalising."""
    return response.upper() == references[0].upper()


def _ocrvqa(response: str, references: list[str], sample: Sample) -> float:
    """Exact, whatever the case. Defect: what holds "Unanswerable" is wrong, also where that is the answer."""
    return "Unanswerable" not in response and response.lower() == references[0].lower()


def _grounding(response: str, references: list[str], sample: Sample) -> float:
    """IoU > 0.5. Defect: once the brackets are gone, the first and the last character are cut off too.

    "[0.12, 0.33, 0.55, 0.97]" is read as .12, .33, .55, 0.9: with two decimals a perfect model loses small boxes.
    """
    bare = response.replace("[", "").replace("]", "")
    wanted = _floats(references[0].replace("[", "").replace("]", ""))
    if wanted is None:
        raise missing(sample, "references", f"{references[0][:60]!r} is no box")
    given = _floats(bare[1:-1])
    return given is not None and overlap(given, wanted) > 0.5


def _floats(text: str) -> list[float] | None:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return numbers if len(numbers) == 4 else None


def _knowledge(response: str, references: list[str], sample: Sample) -> float:
    """A judge's grade from 0 to 10 (Knowledge Capability, `evaluate_score.py`): the response is the judge's reply.

    Defect: of a reply that is no number and no fraction, the first digit but 0 counts ("Score: 10" is 1), and the
    denominator of a fraction is not looked at ("8/100" is 8).
    """
    try:
        grade = float(response)
    except ValueError:
        numerator, slash, _ = response.partition("/")
        if slash:
            grade = float(numerator) if numerator.isnumeric() and numerator.isascii() else 0.0
        else:
            digit = re.search(r"[1-9]", response)
            grade = float(digit[0]) if digit else 0.0
    return grade / 10 if grade <= 10 else 0.0


TASKS = {
    "scienceqa": protocol(_scienceqa),
    "textvqa": protocol(_textvqa, right_from=50),
    "imagenet": protocol(_imagenet),
    "gqa": protocol(_gqa),
    "vizwiz": protocol(exact),
    "grounding": protocol(_grounding),
    "vqav2": protocol(exact),
    "ocrvqa": protocol(_ocrvqa),
    "knowledge": protocol(_knowledge, right_from=50),
}
