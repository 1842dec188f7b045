"""Which samples of past stages are kept. Nothing is drawn: every choice follows from the samples' ids and the seed.

A buffer of fixed size is shared out to the stages by their age, and each stage's part is the first of its samples in
an order that does not change, so as a buffer is shared by more stages it only ever loses samples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mcit.data_prep.identity import rank
from mcit.data_prep.schema import Sample

from .base import Past

Selection = Literal["random", "modality", "collision"]


def shares_by_age(k: int, stages: Iterable[int], exponent: float) -> list[float]:
    """What each of the past `stages` counts at stage `k`: age^-exponent, 1 for the last one."""
    return [(k - stage) ** -exponent for stage in stages]


def parts(sizes: Sequence[int], shares: Sequence[float], buffer: int) -> list[int]:
    """How many samples of each stage a buffer holds, in proportion to `shares`, of no stage more than it has.

    By highest averages (D'Hondt), so that another stage takes from the others and gives to none.
    """
    taken = [0] * len(sizes)
    for _ in range(min(buffer, sum(sizes))):
        has_more = [i for i, size in enumerate(sizes) if taken[i] < size]
        taken[max(has_more, key=lambda i: shares[i] / (taken[i] + 1))] += 1
    return taken


def even_buffer(past: Past, buffer: int, seed: int) -> list[Sample]:
    """A buffer of which every stage has the same share, drawn at random."""
    return [
        sample
        for part in cut({k: ordered(one, [], "random", seed) for k, one in past.items()}, buffer)
        for sample in part
    ]


def cut(past: Past, buffer: int) -> list[list[Sample]]:
    """The first samples of each stage, as many as its even share of a buffer holds."""
    sizes = parts([len(samples) for samples in past.values()], [1.0] * len(past), buffer)
    return [list(samples[:size]) for samples, size in zip(past.values(), sizes, strict=True)]


def ordered(past: Sequence[Sample], own: Sequence[Sample], selection: Selection, seed: int) -> list[Sample]:
    """A stage's past samples, those first that a small buffer would keep while `own` are trained."""

    def drawn(sample: Sample) -> bytes:
        return rank(f"buffer {seed} {sample['task']} {sample['id']}")

    if selection == "modality":
        pictures = sum(bool(sample["images"]) for sample in own) * 2 >= len(own)
        return sorted(past, key=lambda sample: (bool(sample["images"]) != pictures, drawn(sample)))
    if selection == "collision":
        common = word_shares(own)
        return sorted(past, key=lambda sample: (-collision(sample, common), drawn(sample)))
    return sorted(past, key=drawn)


def word_shares(samples: Sequence[Sample]) -> Mapping[str, float]:
    """The share of the samples in whose prompts each word occurs."""
    counts = Counter(word for sample in samples for word in words(sample))
    return {word: count / len(samples) for word, count in counts.items()}


def collision(sample: Sample, common: Mapping[str, float]) -> float:
    """How much a prompt reads like those of the new task: the mean share of its words there, 0 to 1."""
    found = words(sample)
    return sum(common.get(word, 0.0) for word in found) / max(1, len(found))


def words(sample: Sample) -> set[str]:
    """The different words of a prompt."""
    return {word for turn in sample["prompt"] for word in turn["content"].lower().split()}
