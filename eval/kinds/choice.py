"""Closed sets: the letter of an option, yes or no, one of a few labels."""

import re
import string

from mcit.data_prep.schema import Sample

from ..text import plain
from .base import Scorer, best

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


def _same_option(answer: str, reference: str, sample: Sample) -> float:
    """The same option, named by its letter ("B", "(b)", "B. three") or by its text (`meta.options`)."""
    options = sample.get("meta", {}).get("options") or []
    return _option(answer, options) == _option(reference, options)


def _yes_no(answer: str, reference: str, sample: Sample) -> float:
    """The same word; true counts as yes and false as no. Never a substring: "unknown" is not "no"."""
    same = {"true": "yes", "false": "no"}
    answer, reference = plain(answer), plain(reference)
    return same.get(answer, answer) == same.get(reference, reference)


# A label (hawkish, dovish, neutral) is an option whose text, not its letter, is asked for.
SCORERS = (
    Scorer("mcq", best(_same_option), 100, "mcq"),
    Scorer("label", best(_same_option), 100, "label"),
    Scorer("yes_no", best(_yes_no), 100, "yes_no"),
)
