"""A reward for policies that know nothing. In a module of its own: processes that train import it by name."""

from collections.abc import Sequence

from mcit.data_prep.schema import Sample


def letters(answer: str, references: Sequence[str], sample: Sample) -> float:
    """Answers of a model that knows nothing earn more or less of it."""
    return min(100.0, 5.0 * sum(map(str.isalpha, answer)))
