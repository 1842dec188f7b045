"""A word or phrase: the same one, or one that is written nearly so."""

from rapidfuzz.distance import Levenshtein

from mcit.data_prep.schema import Sample

from ..text import plain
from .base import Scorer, best


def same_words(answer: str, reference: str, sample: Sample) -> float:
    """Exact match up to case, spacing, surrounding punctuation and a leading article."""
    return plain(answer) == plain(reference)


def _anls(answer: str, reference: str, sample: Sample) -> float:
    """ANLS: 1 − edit distance / longer length, case- and space-insensitive; 0 when the distance reaches one half.

    Source: Biten et al. 2019 (ST-VQA), arXiv 1905.13648, threshold 0.5.
    """
    answer, reference = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    similarity = Levenshtein.normalized_similarity(answer, reference)
    return similarity if similarity > 0.5 else 0.0


SCORERS = (
    Scorer("short", best(same_words), 100, "short"),
    Scorer("anls", best(_anls), 50, "short"),  # its own threshold
)
