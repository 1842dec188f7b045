"""MLLM-CTBench (arXiv 2508.08275), as its code scores: yueluoshuangtian/MLLM-CTBench @17d034b.

Two scripts in `eval/accuracy/qwen_new_eval_tool/`, whose figures are not comparable: `_common.py` (`ctbench:`), which
`eval_matrix.py` loads, and its correction `_common_v2.py` (`ctbench_v2:`). A third, ROUGE-L and exact match in
`qwen_cl/eval/eval.py`, is not here. Neither tells an unknown task: anything is scored as art. Here it is refused.
"""

import re
import string
from difflib import SequenceMatcher

from mcit.data_prep.schema import Sample

from .base import protocol

_NUMBER = re.compile(r"-?\d+\.?\d*")
_LABELS = ("hawkish", "dovish", "neutral")


def _blocks(text: str, tag: str) -> tuple[str, list[str]]:
    """The text around `<tag>…</tag>`, a space for each, and what stands inside; in time proportional to the length."""
    opening, closing = re.compile(f"<{tag}>", re.IGNORECASE), re.compile(f"</{tag}>", re.IGNORECASE)
    around, inside, at = [], [], 0
    while (start := opening.search(text, at)) and (end := closing.search(text, start.end())):
        around.append(text[at : start.start()])
        inside.append(text[start.end() : end.start()])
        at = end.end()
    return " ".join([*around, text[at:]]), inside


def _normal(text: str) -> str:
    """Lower case, a space for each punctuation sign. The names of tags stay, as words."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", text.lower()).split())


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def _same_number(wanted: str, given: str) -> bool:
    numbers = _last_number(wanted), _last_number(given)
    return numbers[0] is not None and numbers[1] is not None and abs(numbers[0] - numbers[1]) < 1e-3


def _alike(wanted: str, given: str) -> bool:
    """Whether a longer answer is 60 % the same, by difflib."""
    return len(wanted) > 8 and SequenceMatcher(None, wanted, given).ratio() >= 0.6


# --- `_common.py` ---------------------------------------------------------------------------------------------------


def _text(response: str, references: list[str], sample: Sample) -> float:
    """art, OCR, medical, science: contained, or its first 30 characters are, or 60 % alike.

    Defect: punctuation makes words of tags, and anything may contain a letter: gold A is right in
    "<answer>C</answer>", which reads "answer c answer".
    """
    wanted, given = (_normal(_blocks(text, "think")[0]) for text in (references[0], response))
    return bool(wanted) and (wanted[:30] in given or _alike(wanted, given))


def _number(response: str, references: list[str], sample: Sample) -> float:
    """math, numglue: the same number. Defect: the last of the response: "3. (see Figure 2)" is 2; letters are wrong."""
    return _same_number(*(_blocks(text, "think")[0] for text in (references[0], response)))


def _fomc(response: str, references: list[str], sample: Sample) -> float:
    """fomc: the label named first. Defect: the published answers are letters, so that every response is wrong."""
    label = next((label for label in _LABELS if label in references[0].lower()), None)
    given = _blocks(response, "think")[0].lower()
    named = [(given.find(known), known) for known in _LABELS if known in given]
    return bool(named) and min(named)[1] == label


TASKS = {
    "numglue": protocol(_number),
    "art": protocol(_text),
    "math": protocol(_number),
    "fomc": protocol(_fomc),
    "medical": protocol(_text),
    "ocr": protocol(_text),
    "science": protocol(_text),
}


# --- `_common_v2.py` ------------------------------------------------------------------------------------------------


def _answer(response: str) -> str:
    """What stands in the last `<answer>`; without one, what is outside of `<think>`."""
    if answers := _blocks(response, "answer")[1]:
        return answers[-1].strip()
    rest = re.sub(r"</?answer>", " ", _blocks(response, "think")[0], flags=re.IGNORECASE)
    return re.split("<think>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()


def _letter(text: str) -> str | None:
    """The letter at the start, else the first that stands alone, whatever its case."""
    first = re.match(r"\(?\s*([A-Ha-h])\s*(?:[.):,]|$)", text.strip())
    alone = first or re.search(r"\b([A-H])\b", text.upper())
    return alone[1].upper() if alone else None


def _choice_v2(response: str, references: list[str], sample: Sample) -> float:
    """fomc, science: the same letter, else as open text. Defect: an article is a letter ("it shows a dog": A)."""
    wanted, given = _letter(references[0].upper()), _letter(_answer(response))
    return wanted == given if wanted and given else _open(references[0], _answer(response))


def _open(wanted: str, given: str) -> bool:
    """Contained, or 60 % alike. Defect: "no" is in "unknown"."""
    wanted, given = _normal(wanted), _normal(given)
    return bool(wanted) and (wanted in given or _alike(wanted, given))


def _open_v2(response: str, references: list[str], sample: Sample) -> float:
    return _open(references[0], _answer(response))


def _number_v2(response: str, references: list[str], sample: Sample) -> float:
    """numglue: the same number. Defect: the last of the answer."""
    return _same_number(references[0], _answer(response))


def _math_v2(response: str, references: list[str], sample: Sample) -> float:
    """math: a letter, yes or no, a number, or text, by what the reference is. Defect: "nothing" starts with "no"."""
    wanted, given = references[0].strip(), _answer(response)
    if re.fullmatch("[A-Ha-h]", wanted):
        return _choice_v2(response, references, sample)
    if wanted.lower() in ("yes", "no"):
        return _normal(given).startswith(wanted.lower()) or wanted.lower() in _normal(given).split()
    return _same_number(wanted, given) or _open(wanted, given)


TASKS_V2 = {
    "numglue": protocol(_number_v2),
    "art": protocol(_open_v2),
    "math": protocol(_math_v2),
    "fomc": protocol(_choice_v2),
    "medical": protocol(_open_v2),
    "ocr": protocol(_open_v2),
    "science": protocol(_choice_v2),
}
