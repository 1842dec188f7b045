"""Answers as texts: normalising them, telling a sentence from a phrase, numbers, boxes, tags and formulas."""

import re
import unicodedata
from collections.abc import Sequence

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = {word: value for value, word in enumerate(_UNITS)} | {
    word: 20 + 10 * value for value, word in enumerate(_TENS)
}
SCALE_WORDS = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
DASHES = str.maketrans("−–‑", "---")  # as a sign; a long dash is punctuation
_ARTICLES = {"a", "an", "the"}
_TOKEN = re.compile(r"(?<!\w)[-+]?\d[\d,]*(?:\.\d+)?|[^\W_]+(?:['’][^\W_]+)*")

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:[$€£]\s?)?([-+]?)[$€£]?({DIGITS})\s?%?\.?")
COORDINATE = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"  # a comma separates here, it groups no thousands
BOX_IN_TEXT = re.compile(r"\[\s*" + r"\s*,\s*".join([rf"({COORDINATE})"] * 4) + r"\s*\]")

_SUBJECTS = set(
    "the this that these those it its it's there there's here he he's she she's they they're we i you a an in on at "
    "yes no my his her their our your one both all some that's here's what's".split()
)
_VERBS = set(
    "is are was were am isn't aren't wasn't weren't has have had shows show depicts depict contains contain reads "
    "read says say displays display can could will would should does do did seems seem appears appear looks look "
    "equals equal it's there's he's she's that's they're here's".split()
)
_ABBREVIATIONS = set("st mr mrs ms dr jr sr no vs mt ft inc co ltd prof gen col etc e.g i.e a.m p.m u.s d.c".split())
ANSWER_IS = re.compile(
    r"(?:\b(?:answer|result|solution|option|choice)\b(?:\s+(?:to|for|of)\b[^.:\n]{0,80}?)?"
    r"(?:\s+(?:is|are|was|should be|would be|must be)\b\s*:?|\s*[:=])|####)\s*",
    re.IGNORECASE,
)
LETTERED = re.compile(r"(?:\([A-Z]\)|[A-Z][).:])\s+(?=[a-z0-9])")  # "B. red", but not "C. S. Lewis"


def normalise(text: str) -> str:
    """Comparable form of an answer: no case, articles, punctuation or thousands separators; number words as digits.

    An answer of symbols alone stays itself, so that no two different answers become the same empty string.
    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").casefold().strip()
    tokens = [token.replace(",", "").replace("’", "'") for token in _TOKEN.findall(text)]
    kept = [str(NUMBER_WORDS.get(token, token)) for token in tokens if token not in _ARTICLES]
    return " ".join(kept) or " ".join(tokens) or text


def sentences(text: str) -> list[str]:
    """Split a text at line breaks and at `.`, `!`, `?` followed by white space, but not after `St.` or an initial."""
    parts, start = [], 0
    for match in re.finditer(r"[.!?]+(?=\s)|\n+", text):
        before = text[max(start, match.start() - 20) : match.start()].split()
        last = before[-1].lstrip("(\"'").lower() if before else ""
        initial = len(last) == 1 and last.isalpha() and match.group() == "."
        if match.group()[0] != "\n" and (last in _ABBREVIATIONS or initial):
            continue
        parts.append(text[start : match.end()].strip())
        start = match.end()
    return [part for part in [*parts, text[start:].strip()] if part]


def is_sentence(text: str) -> bool:
    """Whether a text reads as a sentence, not as a phrase: a subject with a verb, or seven words with a full stop."""
    parts = [word.strip("\"'(),.;:!?").lower().replace("’", "'") for word in text.split()]
    if parts and len(parts) + ("'" in parts[0]) >= 3 and parts[0] in _SUBJECTS and not _VERBS.isdisjoint(parts):
        return True
    return len(parts) > 6 and text.rstrip().endswith((".", "!", "?"))


def is_phrase(text: str) -> bool:
    """Whether a text is a word or phrase: one line of at most 15 words (titles and lists are phrases too, as OCR-VQA's
    answers show), and no sentence, box, "answer: …", lettered option or tagged answer."""
    other_form = is_sentence(text) or BOX_IN_TEXT.fullmatch(text) or LETTERED.match(text) or ANSWER_IS.search(text)
    tagged = re.search(r"</?(?:think|answer)>", text)
    return 0 < len(text.split()) <= 15 and "\n" not in text and not other_form and not tagged


def read_box(text: str) -> list[str] | None:
    """The four numbers, as written, of a text that is `[x1, y1, x2, y2]`, with x1 < x2, y1 < y2 and none negative."""
    match = BOX_IN_TEXT.fullmatch(text.strip())
    return ordered_box(list(match.groups())) if match else None


def ordered_box(numbers: list[str]) -> list[str] | None:
    """Four numbers, as written, if they are a box (see `read_box`)."""
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = map(float, numbers)
    return numbers if 0 <= x1 < x2 and 0 <= y1 < y2 else None


def read_number(text: str) -> str | None:
    """The number a text consists of (a currency sign, a percent sign or a full stop may stand by), without commas."""
    match = _NUMBER.fullmatch(text.strip().translate(DASHES))
    return match[1].removeprefix("+") + match[2].replace(",", "") if match else None


def named_in(options: Sequence[str], text: str) -> int | None:
    """Which option `text` is: the same up to case, else the only one that `normalise` makes the same. None: no one.

    `normalise` alone would not tell "x > 3" from "x < 3".
    """
    for form in (_as_written, normalise):
        found = [place for place, option in enumerate(options) if form(option) == form(text)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _as_written(text: str) -> str:
    return " ".join(text.casefold().split())


def split_tags(response: str) -> tuple[str | None, str]:
    """Split `<think>…</think><answer>…</answer>` leniently into (thinking, answer).

    The last complete `<answer>` counts; an unclosed one runs to the end; without one, what follows `</think>` is the
    answer; a response that ends inside its thinking has none. Text without tags is all answer.
    """
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        before, answer = response[:start], response[start + len("<answer>") : end]
    elif "<answer>" in response:
        before, _, answer = response.rpartition("<answer>")
    elif "</think>" in response:
        before, _, answer = response.rpartition("</think>")
    elif "<think>" in response:
        before, answer = response, ""
    else:
        return None, response.strip()
    think = re.sub(r"</?(?:think|answer)>", "", before).strip()
    return think or None, answer.strip()


def strip_math(text: str) -> str:
    """Drop the delimiters around a formula: `$…$`, `$$…$$`, `\\(…\\)`, `\\[…\\]`, and a full stop after them."""
    text = text.strip().rstrip(".").strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if len(text) > len(left + right) and text.startswith(left) and text.endswith(right):
            return text[len(left) : -len(right)].strip()
    return text
