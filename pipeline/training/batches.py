"""Which samples train together: the same global batches on any number of devices, and never images beside text alone.

A *global batch* is what one optimizer step learns from. Every process works through it in *micro-steps*, all of them at
the same time; what one process does in one micro-step is its *micro-batch*. A micro-step has images on every process
or on none: TRL's GRPO cannot batch the two together, and processes that share out a model's weights wait for each other
inside the vision tower (ZeRO-3 hangs where only some of them have an image).
"""

import random
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence, Sized
from typing import NamedTuple, TypeVar

import torch
from torch.utils.data import Dataset, Sampler

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Sample

T = TypeVar("T")


class MicroBatch(NamedTuple):
    """Samples, by index, of one process in one micro-step."""

    samples: Sequence[int]
    loss: bool = True  # False: a single sample that only keeps the process in step with the others


class MicroBatches(Dataset[MicroBatch]):
    """Hands a sampler's micro-batches through to the collator."""

    def __init__(self, sampler: Sized):
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __getitem__(self, micro_batch: MicroBatch) -> MicroBatch:
        return micro_batch


def with_images(samples: Sequence[Sample]) -> list[bool]:
    """Which samples have images."""
    return [bool(sample["images"]) for sample in samples]


def same_images(samples: Sequence[Sample]) -> list[Hashable]:
    """What is equal for samples with the same images; a sample without any is like no other."""
    return [tuple(sample["images"]) or place for place, sample in enumerate(samples)]


class Drawn(NamedTuple):
    """Samples, by index, of which every global batch has `per_batch` beside the stage's own."""

    indices: range
    per_batch: int
    rested: bool = False  # always in the same order, so that each is seen again after the same number of batches

    def of(self, number: int, seed: int) -> list[int]:
        """Those of global batch `number`, counted from 0 over all epochs: permutations one after the other, cut."""
        places = range(number * self.per_batch, (number + 1) * self.per_batch)
        turns = {place // len(self.indices): list(self.indices) for place in places}
        for turn, order in turns.items():
            random.Random(f"{seed} {self.indices.start} {0 if self.rested else turn}").shuffle(order)
        return [turns[place // len(self.indices)][place % len(self.indices)] for place in places]


def micro_steps(parts: Iterable[tuple[int, Collection[bool]]], size: int) -> int:
    """Micro-steps of at most `size` samples that a global batch needs, whatever of its samples have images.

    `parts` are what it is made of: how many samples, out of which (whether each has images).
    """
    counts = [(count, set(has_images)) for count, has_images in parts]
    total = sum(count for count, _ in counts)
    least = sum(count for count, kinds in counts if kinds == {True})
    most = sum(count for count, kinds in counts if True in kinds)
    return max(-(-images // size) - (images - total) // size for images in range(least, most + 1))


def deal(
    batch: Sequence[int], has_images: Sequence[bool], size: int, processes: int, steps: int | None = None
) -> Iterator[list[MicroBatch]]:
    """A batch in micro-steps of at most `size` samples, a micro-batch for each process in each.

    Images come first: a kind in as few micro-steps as hold it, the last one in what remain of `steps`, if given.
    """
    kinds = by_kind(batch, has_images)
    needed = [-(-len(kind) // size) for kind in kinds]
    if steps is not None:
        needed[-1] = steps - sum(needed[:-1])
    for kind, count in zip(kinds, needed, strict=True):
        for step in _evenly(kind, count):
            shares = _evenly(step, processes)
            yield [MicroBatch(share) if share else MicroBatch(kind[-1:], loss=False) for share in shares]


def by_length(batch: Sequence[int], lengths: Sequence[int], alike: Sequence[Hashable]) -> list[int]:
    """A batch from long to short; samples with equal `alike` follow each other, where the longest of them is."""
    groups = _grouped(batch, alike)
    return [i for group in sorted(groups, key=lambda group: -max(lengths[i] for i in group)) for i in group]


class GlobalBatchSampler(Sampler[MicroBatch]):
    """Micro-batches, process by process within a micro-step, as accelerate deals them out (one each in turn).

    Guaranteed, under a seed: the global batches are a permutation an epoch, cut into whole batches and filled up from
    its own start (a smaller last one would be weighted differently). They depend on nothing but the number of samples
    and the size of the global batch: not on processes, micro-batches or images. All have the same number of
    micro-steps; a micro-step is of one kind; no micro-batch is larger than `per_device`. The loss is a mean over the
    global batch's tokens, so only the order of summation changes with the split. Where a kind has fewer samples left
    than there are processes, the others repeat one without loss.

    What is `drawn` beside the stage's own samples has the indices behind theirs. It changes neither which of these are
    in a global batch nor how many global batches there are, and comes last in a micro-batch. Where `alike` is given,
    the permutation is one of those in which the stage's samples with equal values follow each other.

    Where `lengths` are given, of all samples, a global batch of several micro-batches is dealt from long to short, so
    that little of a micro-batch is padding, and the longest of a micro-step go to the first process and the last one in
    turns; those of equal `trees`, if given, stay together.
    """

    def __init__(
        self,
        has_images: Sequence[bool],
        global_batch_size: int,
        per_device: int,
        processes: int,
        seed: int,
        drawn: Sequence[Drawn] = (),
        alike: Sequence[Hashable] | None = None,
        lengths: Sequence[int] | None = None,
        trees: Sequence[Hashable] | None = None,
    ):
        self.alike, self.lengths, self.trees = alike, lengths, trees or range(len(has_images))
        self.has_images, self.global_batch_size = has_images, global_batch_size
        self.per_device, self.processes, self.seed, self.drawn = per_device, processes, seed, drawn
        self.own = len(has_images) - sum(len(beside.indices) for beside in drawn)
        self.batches = -(-self.own // global_batch_size)  # an epoch
        self.micro_step_size = per_device * processes  # samples, at most
        parts = [(global_batch_size, has_images[: self.own])]
        parts += [(beside.per_batch, [has_images[i] for i in beside.indices]) for beside in drawn]
        self.micro_steps = micro_steps(parts, self.micro_step_size)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.micro_steps * self.processes

    def __iter__(self) -> Iterator[MicroBatch]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(self.own, generator=generator).tolist()
        if self.alike:
            groups = _grouped(order, self.alike)
            chosen = torch.randperm(len(groups), generator=generator).tolist()
            order = [index for group in chosen for index in groups[group]]
        first = self.epoch * self.batches
        for number, batch in enumerate(_filled(order, self.global_batch_size), first):
            batch += [index for beside in self.drawn for index in beside.of(number, self.seed)]
            if self.lengths and self.micro_steps * self.processes > 1:
                batch = by_length(batch, self.lengths, self.trees)
            steps = deal(batch, self.has_images, self.micro_step_size, self.processes, self.micro_steps)
            for turn, step in enumerate(steps):
                for share, loss in reversed(step) if self.lengths and turn % 2 else step:
                    yield MicroBatch(sorted(share, key=lambda index: index >= self.own), loss)


class GroupSampler(Sampler[int]):
    """Prompts for `GRPOTrainer`, in TRL's own order: each `group` times in a row, a generation batch `repeats` times.

    Guaranteed, under a seed: a generation batch (`prompts` of them, over all processes) is of one kind, since TRL
    generates and scores it as one batch; every prompt is seen in every epoch; each kind's last batch is filled up from
    that kind's own start. Nothing depends on the number of processes.
    """

    def __init__(self, has_images: Sequence[bool], prompts: int, group: int, repeats: int, seed: int):
        self.has_images, self.prompts, self.group, self.repeats, self.seed = has_images, prompts, group, repeats, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        batches = sum(-(-len(kind) // self.prompts) for kind in by_kind(range(len(self.has_images)), self.has_images))
        return batches * self.prompts * self.group * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.has_images), generator=generator).tolist()
        batches = [batch for kind in by_kind(order, self.has_images) for batch in _filled(kind, self.prompts)]
        for place in torch.randperm(len(batches), generator=generator).tolist():
            for _ in range(self.repeats):
                for index in batches[place]:
                    yield from [index] * self.group


def check_prompts(has_images: Sequence[bool], prompts: int, stage: str) -> None:
    """Refuse a stage in which a kind of samples does not fill a generation batch: it would be seen several times over.

    Raises `InputError`.
    """
    kinds = by_kind(range(len(has_images)), has_images)
    smallest: list[int] = min(kinds, key=len, default=[])
    if len(smallest) < prompts:
        which = "" if len(kinds) < 2 else (" with images" if has_images[smallest[0]] else " without images")
        raise InputError(
            f"{len(smallest)} samples{which} do not fill one generation batch of {prompts} prompts",
            where=f"stage {stage}",
            field="train.global_batch_size",
            remedy="Lower it (it counts completions), or give more samples",
        )


def by_kind(indices: Sequence[int], has_images: Sequence[bool]) -> list[list[int]]:
    """The indices with images and those without, each kind that occurs."""
    kinds = [[i for i in indices if has_images[i] == kind] for kind in (True, False)]
    return [kind for kind in kinds if kind]


def _grouped(order: Sequence[int], alike: Sequence[Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for index in order:
        groups.setdefault(alike[index], []).append(index)
    return list(groups.values())


def _filled(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """`order` in batches of `size`, the last one filled up from the start (over and over, if need be)."""
    for start in range(0, len(order), size):
        yield [order[place % len(order)] for place in range(start, start + size)]


def _evenly(items: Sequence[T], parts: int) -> Iterator[Sequence[T]]:
    """`items` in `parts` consecutive parts whose sizes differ by one at most."""
    for part in range(parts):
        yield items[len(items) * part // parts : len(items) * (part + 1) // parts]
