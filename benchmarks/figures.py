"""A figure of a benchmark: how many times less one way takes than another, which `table.py` shows with all others."""

from collections.abc import Sequence
from statistics import median
from typing import TypedDict


class Figure(TypedDict):
    """What was measured against what; `ratio` is theirs over ours, above 1 where ours takes less."""

    figure: str
    against: str
    ratio: float
    spread: list[float]  # the smallest and the largest of the rounds
    rounds: int
    target: float | None


def figure(
    name: str, against: str, ours: Sequence[float], theirs: Sequence[float], target: float | None = None
) -> Figure:
    """A figure of what both took in each round, taking turns; the ratio is the median of the rounds'."""
    ratios = [theirs_took / ours_took for ours_took, theirs_took in zip(ours, theirs, strict=True)]
    spread = [round(min(ratios), 3), round(max(ratios), 3)]
    return Figure(
        figure=name, against=against, ratio=round(median(ratios), 3), spread=spread, rounds=len(ratios), target=target
    )
