"""A prompt and its answers in one row: they stay together where TRL shuffles, and are packed for log-probabilities."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from trl.trainer import grpo_trainer

from mcit.data_prep.errors import InputError

from ..training.packing import PACKING, pack


def check_whole_groups(per_device: int, per_process: int, size: int) -> None:
    """Refuse to pack where the `size` answers to a prompt are cut up unevenly. Raises `InputError`.

    A process has `per_process` answers of a generation batch, `per_device` of them at a time.
    """
    if per_process % size or (per_device % size and size % per_device):
        raise InputError(
            f"{per_process} answers on each process, {per_device} at a time, are not whole groups of {size}",
            where="recipe",
            field="train.packing",
            remedy="Make train.rft.args.per_device_train_batch_size a multiple of num_generations",
        )


@contextlib.contextmanager
def kept_together(size: int) -> Iterator[None]:
    """Inside, TRL's shuffle of a generation batch moves whole groups of `size` rows, and draws what it always draws."""
    shuffle = grpo_trainer.shuffle_sequence_dict

    def by_group(seq_dict: dict[str, Any]) -> dict[str, Any]:
        rows = len(next(value for value in seq_dict.values() if value is not None))
        groups = list(dict.fromkeys((torch.randperm(rows) // size).tolist()))
        order = [row for group in groups for row in range(group * size, (group + 1) * size)]
        return {key: _in_order(value, order) for key, value in seq_dict.items()}

    grpo_trainer.shuffle_sequence_dict = by_group
    try:
        yield
    finally:
        grpo_trainer.shuffle_sequence_dict = shuffle


def packed_groups(model: Callable[..., Any], size: int, width: int) -> Callable[..., Any]:
    """`model`, called with rows of which each `size` in turn are answers to one prompt: these share its row."""

    def call(**inputs: Any) -> Any:
        ids, mask = inputs["input_ids"].cpu(), inputs["attention_mask"].cpu()
        prompts = [row // min(size, len(ids)) for row in range(len(ids))]
        return model(**inputs, **{PACKING: pack(ids, mask, prompts, width)})

    return call


def _in_order(value: Any, order: list[int]) -> Any:
    if value is None or (isinstance(value, Tensor) and not value.ndim):
        return value
    return value[order] if isinstance(value, Tensor) else [value[row] for row in order]
