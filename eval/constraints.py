"""The form that a question's style asks for, as a pattern that holds an answer to it while it is generated.

Two kinds of forms can be held to. Of a *closed set* the answer is one of a few texts: an option's letter, yes or no,
one of the labels, a word out of the task's own answers where those are few (`mcit.data_prep.choices`). A number and a
box are *patterns*. Free text, formulas and words out of an open vocabulary have no form that would leave the content
open.

A pattern bounds whatever may repeat (digits, blanks), or a weak model would repeat it until it is cut off. It is a
regular expression that means the same to Python and to llguidance, which both engines decode under.
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

from mcit.data_prep.schema import Sample, Style

# Both cases: a task writes one of them, and the policy says which it has learned.
_YES_NO = ("Yes", "No", "yes", "no")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,4}|[0-9]{1,15})(?:\.[0-9]{1,10})?"
_EDGE = r"[0-9]{1,5}(?:\.[0-9]{1,5})?"
_PATTERNS: dict[Style, str] = {
    "number": rf"-?[$€£]?{_DIGITS}%?",
    "bbox": rf"\[{_EDGE}, ?{_EDGE}, ?{_EDGE}, ?{_EDGE}\]",
}
# Any text without tags. A `<` that is no tag's ("a < b") may stand in it.
_THINKING = r"\s?(?:[^<\s]|<+[^<A-Za-z/])(?:[^<]|<+[^<A-Za-z/])*"
_NONE: dict[Style, str] = {
    "mcq": "its samples do not say what the options are",
    "label": "its samples do not say what the labels are, and its answers are no closed set",
    "short": "its answers are no closed set",
}


class Constraint(NamedTuple):
    """What an answer is held to."""

    pattern: str  # of the whole response
    choices: tuple[str, ...]  # the answers that it allows, where they are a closed set; else empty


def constraint_of(sample: Sample, choices: Sequence[str] | None) -> Constraint | None:
    """The form that `sample` asks for; None where its style has none to be held to.

    `choices` are the task's own answers, if they are a closed set. Of a question that asks for thinking, the thinking
    is free but for tags, and the answer after it is held to the form.
    """
    closed = _closed_set(sample, choices)
    pattern = "|".join(re.escape(choice) for choice in closed) if closed else _PATTERNS.get(sample["style"])
    if pattern is None:
        return None
    if sample["reasoning"] == "think":
        return Constraint(rf"<think>{_THINKING}</think>\s?<answer>(?:{pattern})</answer>", closed)
    return Constraint(pattern, closed)


def why_unconstrained(style: Style) -> str:
    """Why a task whose samples have no constraint has none."""
    return _NONE.get(style, f"the style {style} has no form that would leave the content open")


def _closed_set(sample: Sample, choices: Sequence[str] | None) -> tuple[str, ...]:
    options = (sample.get("meta") or {}).get("options") or []
    match sample["style"]:
        case "yes_no":
            return _YES_NO
        case "mcq":
            return tuple(string.ascii_uppercase[: len(options)])
        case "label":
            return tuple(dict.fromkeys(options or choices or ()))
        case "short":
            return tuple(choices or ())
        case _:
            return ()
