"""Boxes [x1, y1, x2, y2]: how much of two they share."""

import math
import re
from collections.abc import Sequence

from mcit.data_prep.schema import Sample

from .base import Scorer, best

_COORDINATE = re.compile(r"(?<![\w.])-?(?:\d+(?:\.\d*)?|\.\d+)")


def overlap(given: Sequence[float], wanted: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same units; 0 where they share nothing, as with an inverted one."""
    sides = [(box[2] - box[0], box[3] - box[1]) for box in (given, wanted)]
    common = [max(0.0, min(given[at + 2], wanted[at + 2]) - max(given[at], wanted[at])) for at in (0, 1)]
    shared = common[0] * common[1]
    union = sum(width * height for width, height in sides) - shared
    return shared / union if union > 0 else 0.0


def _box(text: str) -> list[float] | None:
    numbers = [float(found[0]) for found, _ in zip(_COORDINATE.finditer(text), range(4), strict=False)]
    return numbers if len(numbers) == 4 and all(map(math.isfinite, numbers)) else None


def _iou(answer: str, reference: str, sample: Sample) -> float:
    """Intersection over union; 0 when there is no box. A point is the same point, though it has no area."""
    given, wanted = _box(answer), _box(reference)
    if given is None or wanted is None:
        return 0.0
    return 1.0 if given == wanted else overlap(given, wanted)


def _bbox(answer: str, reference: str, sample: Sample) -> float:
    """Right when IoU > 0.5, as in RefCOCO."""
    return _iou(answer, reference, sample) > 0.5


SCORERS = (
    Scorer("bbox", best(_bbox), 100, "bbox"),
    Scorer("iou", best(_iou), math.nextafter(50, 100), "bbox"),  # mean IoU; right where bbox is
)
