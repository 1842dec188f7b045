"""What TRL's output layer is computed for."""

import contextlib
from collections.abc import Iterator

import torch
from trl.trainer import utils


@contextlib.contextmanager
def labels_alone() -> Iterator[None]:
    """Inside, TRL scores tokens that have a label, and no others, on a CPU too.

    It does so on devices with Triton. Elsewhere it scores all tokens, most of them for nothing, for those that compile
    a program for every number of tokens; a CPU compiles none.
    """
    by_trl = utils._use_triton

    def alone(device: torch.device) -> bool:
        return device.type == "cpu" or by_trl(device)

    utils._use_triton = alone
    try:
        yield
    finally:
        utils._use_triton = by_trl
