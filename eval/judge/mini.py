"""Judge data of the mini stream: its rationales, corrupted in graded ways, each rated by the exact checker.

They are of the stream that things are tuned on, so a judge has seen no question of a run that it judges.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

from mcit.data_prep.mini import rationales, tasks
from mcit.data_prep.schema import Sample

from .data import brief, corrupted, rated
from .rubrics import Dimension

_SIZES = {"train": 400, "validation": 20, "test": 60}  # rationales of each task
_READERS = (
    tasks.tuning_think_digits,
    tasks.tuning_think_counting,
    tasks.tuning_think_spatial,
    tasks.tuning_think_grounding,
    tasks.tuning_think_arithmetic,
)


def ratings(part: str) -> Iterator[dict[str, Any]]:
    """Rationales of all five tasks, in turn as they are and corrupted in each way, as samples of judging."""
    for reader in _READERS:
        samples = list(islice(reader(part), _SIZES[part]))
        for sample, made in corrupted(samples, [sample["meta"]["gold_think"] for sample in samples], seed=0):
            scores = cast(dict[Dimension, float], rationales.rate(cast(Sample, sample), made.think))
            yield brief(rated(sample, made, sample["references"][0], scores), part)
