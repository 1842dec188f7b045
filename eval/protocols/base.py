"""What the protocols share."""

from collections.abc import Callable
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample

from ..kinds.base import Scorer

Check = Callable[[str, list[str], Sample], float]  # response, references, sample → 0–1


def protocol(check: Check, right_from: float = 100, **more: Any) -> Scorer:
    """The scorer of a published check. Its name is given by the register."""

    def score(response: str | None, references: list[str], sample: Sample) -> float:
        return 100.0 * check(response or "", references, sample)

    return Scorer("", score, right_from, None, whole=True, **more)


def missing(sample: Sample, field: str, why: str) -> InputError:
    """The error of a sample that lacks what a protocol asks for."""
    return InputError(why, where=f"sample {sample.get('id', '?')}", field=field)
