"""A reward for policies that know nothing. In a module of its own: processes that train import it by name."""

from collections.abc import Sequence

from mcit.data_prep.schema import Sample


def spread(answer: str, references: Sequence[str], sample: Sample) -> float:
    """Another one for nearly every answer, whatever it is made of."""
    return sum(answer.encode()) % 101 / 100
