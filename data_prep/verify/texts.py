"""When two questions, or two answers, are the same: whatever case, spacing, end punctuation and format sentence."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence

from ..schema import Sample
from ..styles import split_prompt, split_reasoning

_ENDS = " \t.,;:!?\"'"


def question_key(sample: Sample, formats: Sequence[str]) -> bytes:
    """Digest (16 bytes) of a sample's questions with their options, all those of a dialogue together.

    The system turn and sentences that ask for a format (those known, and `formats`) do not count.
    """
    asked = [turn["content"] for turn in [*sample["prompt"], *sample["completion"]] if turn["role"] == "user"]
    texts: list[str] = []
    for text in asked:
        question, options, _ = split_prompt(text, formats)
        texts += [question, *(options or [])]
    return _digest(texts)


def answer_key(sample: Sample) -> bytes:
    """Digest (16 bytes) of a sample's answers without their thinking."""
    said = [turn["content"] for turn in [*sample["prompt"], *sample["completion"]] if turn["role"] == "assistant"]
    return _digest(split_reasoning(text, "think")[1] for text in said)


def normal(text: str) -> str:
    """A text in compatibility form, lower case and single spaces, without punctuation at its ends."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip(_ENDS)


def _digest(texts: Iterable[str]) -> bytes:
    return hashlib.blake2b("\0".join(map(normal, texts)).encode(), digest_size=16).digest()
