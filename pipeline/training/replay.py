"""Samples that methods see beside a stage's own: which they are, and what the model makes of them."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from peft import PeftModel
from torch import Tensor, nn

from mcit.data_prep.schema import Sample

from .arguments import split_batch
from .batches import Drawn, GlobalBatchSampler, same_images, with_images

if TYPE_CHECKING:
    from ..recipe.schema import TrainConfig


class Replay(NamedTuple):
    """What a method wants to see: `per_batch` of its `samples` in every global batch (0: it asks for them itself)."""

    samples: Sequence[Sample]
    per_batch: int
    rested: bool = False  # each comes again after the same number of batches


@dataclass(frozen=True)
class Replayed:
    """Replayed samples of one method in one forward pass: n of them, padded on the right to `length` tokens."""

    samples: list[int]  # which of `Replay.samples`
    tokens: list[int]  # how many each has; what is behind them is padding
    hidden: Tensor  # [n, length, units]: the last hidden states, after the model's last norm
    labels: Tensor  # [n, length]: -100 where a token carries no loss


@dataclass(frozen=True)
class Pass:
    """A forward pass over replayed samples of any methods."""

    indices: list[int]  # of `Replays.samples`
    tokens: list[int]
    hidden: Tensor
    labels: Tensor
    counts: bool = True  # False: it only keeps the process in step with the others

    @classmethod
    def inside(cls, rows: Sequence[tuple[int, int]], hidden: Tensor, labels: Tensor) -> "Pass":
        """The last rows of a larger pass, of which `rows` says index and tokens, and `labels` the labels."""
        return cls([index for index, _ in rows], [tokens for _, tokens in rows], hidden[-len(rows) :], labels)


class Replays:
    """All samples of a stage in a row: its own, then those that methods replay, method by method."""

    def __init__(self, own: Sequence[Sample], wanted: Mapping[str, Replay]):
        self.own, self.samples = len(own), list(own)
        self.drawn: dict[str, Drawn] = {}
        for name, replay in wanted.items():
            start = len(self.samples)
            self.samples += replay.samples
            self.drawn[name] = Drawn(range(start, len(self.samples)), replay.per_batch, replay.rested)
        self.has_images = with_images(self.samples)

    @property
    def per_batch(self) -> int:
        """Replayed samples of a global batch."""
        return sum(drawn.per_batch for drawn in self.drawn.values())

    def batches(
        self, train: "TrainConfig", lengths: Sequence[int] | None, processes: int, seed: int
    ) -> GlobalBatchSampler:
        """The global batches of supervised tuning; `lengths` are the tokens of all samples, if they are known.

        Raises `InputError` where the recipe's do not divide by so many processes.
        """
        size, wanted = train.batch_size("sft"), train.sft.args.get("per_device_train_batch_size")
        per_device, _ = split_batch(size, processes, wanted, self.per_batch)
        pictures = same_images(self.samples)
        return GlobalBatchSampler(
            self.has_images,
            size,
            per_device,
            processes,
            seed,
            drawn=list(self.drawn.values()),
            alike=pictures if train.sft.order == "by_image" else None,
            lengths=lengths,
            trees=pictures if train.packing else None,
        )

    def of(self, number: int, seed: int) -> list[int]:
        """The replayed samples, by index, of global batch `number`."""
        return [index for drawn in self.drawn.values() for index in drawn.of(number, seed)]

    def by_method(self, seen: Pass) -> Iterator[tuple[str, Replayed]]:
        """What each method with samples in a forward pass gets to see of it."""
        for name, drawn in self.drawn.items():
            rows = [row for row, index in enumerate(seen.indices) if index in drawn.indices]
            if rows:
                samples = [seen.indices[row] - drawn.indices.start for row in rows]
                tokens = [seen.tokens[row] for row in rows]
                yield name, Replayed(samples, tokens, seen.hidden[rows], seen.labels[rows])


def unwrapped(model: nn.Module) -> Any:
    """The transformers model below PEFT's, if that is what it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: nn.Module) -> Any:
    """The model below its output head; it returns `last_hidden_state` [rows, length, units]."""
    return unwrapped(model).base_model


@contextlib.contextmanager
def caught_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """The last hidden states of every forward pass of `model` inside, as they come."""
    states: list[Tensor] = []
    hook = backbone(model).register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()
