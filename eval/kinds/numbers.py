"""Numbers: equal, or within five per cent."""

import itertools
import re
from fractions import Fraction
from typing import NamedTuple

from mcit.data_prep.schema import Sample

from ..text import plain
from .base import Match, Scorer, best
from .words import same_words


class Number(NamedTuple):
    """A number as written: its exact value (scale words applied) and its unit ("%", "kg", "$" …), or ""."""

    value: Fraction
    unit: str


_NUMBER = re.compile(
    r"(?:(?P<money>[$€£¥])\s?)?(?P<sign>[-+]?)(?P<money2>[$€£¥]?)"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
    r"(?:e(?P<exponent>[-+]?\d{1,3})|\s?/\s?(?P<denominator>\d+))?"
    r"\s?(?P<unit>%|[^\W\d_]+(?:[ /][^\W\d_]+)?(?:\^?[23])?|°\s?[cf]?|[$€£¥])?"
)
_SCALES = {"thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000, "trillion": 1_000_000_000_000}
_LONGEST_NUMBER = 100  # characters; anything longer is not an answer but a flood


def to_number(text: str) -> Number | None:
    """The number that `text` is as a whole ("-1,234.5 kg", "3/4", "50 %", "$2 million"), or None.

    A comma groups thousands; a decimal comma is ambiguous and so is not a number here.
    """
    if len(text) > 4 * _LONGEST_NUMBER or len(text := plain(text)) > _LONGEST_NUMBER:
        return None
    match = _NUMBER.fullmatch(text)
    if not match or (match["denominator"] and not int(match["denominator"])):
        return None
    value = Fraction(match["sign"] + match["digits"].replace(",", "").rstrip(".") + "e" + (match["exponent"] or "0"))
    value /= int(match["denominator"] or 1)
    money = match["money"] or match["money2"] or ""
    unit = (match["unit"] or money).replace("^", "")
    scale, _, rest = unit.partition(" ")
    if scale in _SCALES:
        value, unit = value * _SCALES[scale], rest or money
    return Number(value, "%" if unit in ("percent", "per cent") else unit)


def same_number(answer: Number, reference: Number, tolerance: float) -> bool:
    """Whether two numbers agree within `tolerance` (relative to the reference).

    A unit given on one side only is no difference, and then 50 % is both 50 and 0.5; two different units are one.
    """
    if answer.unit and reference.unit and answer.unit != reference.unit:
        return False

    def readings(number: Number, other: Number) -> list[Fraction]:
        share = number.unit == "%" and not other.unit
        return [number.value, number.value / 100] if share else [number.value]

    pairs = itertools.product(readings(answer, reference), readings(reference, answer))
    return any(abs(given - wanted) <= Fraction(tolerance) * abs(wanted) for given, wanted in pairs)


def _numeric(tolerance: float) -> Match:
    def match(answer: str, reference: str, sample: Sample) -> float:
        given, wanted = to_number(answer), to_number(reference)
        if given is None or wanted is None:
            return same_words(answer, reference, sample)
        return same_number(given, wanted, tolerance)

    return match


SCORERS = (
    Scorer("number", best(_numeric(1e-9)), 100, "number"),
    Scorer("relaxed", best(_numeric(0.05)), 100, "short"),  # ChartQA (arXiv 2203.10244): 5 % on numbers
)
