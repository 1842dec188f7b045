"""vLLM's LoRA arithmetic on a CPU, made right and fast.

vLLM 0.31 multiplies each token with a copy of its adapter's factors, so that a batch of T tokens gathers
[T, out, max_lora_rank] numbers for every layer: hundreds of megabytes for rank 128 even in a tiny model. Worse, it
looks tokens without an adapter up at index -1, which is the last adapter slot: the base model answers with somebody's
adapter as soon as all slots are taken. Here the tokens of an adapter are multiplied together, and tokens without one
are left alone.
"""

from typing import Any

import torch
from torch import Tensor


def _grouped(inputs: Tensor, weights: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """`inputs[t] @ weights[slots[t]].T` for every token t, zero where the slot is negative.

    inputs [tokens, in], weights [slots, (1,) out, in], slots [tokens] → [tokens, out] in `dtype`. The tokens are put in
    order of their slots once, so that each slot's are one block. (vLLM may give slots of the first tokens alone.)
    """
    weights = weights.squeeze(1) if weights.ndim == 4 else weights
    order = slots.argsort(stable=True)
    ordered, blocks = inputs[order].to(dtype), torch.zeros(len(order), weights.shape[1], dtype=dtype)
    start = 0
    for slot, count in zip(*(found.tolist() for found in slots.unique(return_counts=True)), strict=True):
        if slot >= 0:
            torch.mm(ordered[start : start + count], weights[slot].to(dtype).T, out=blocks[start : start + count])
        start += count
    return torch.zeros(inputs.shape[0], weights.shape[1], dtype=dtype).index_copy_(0, order, blocks)


def shrink(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
    """`output = scaling * inputs @ A.T`, in the place of `bgmv_shrink`."""
    product = _grouped(inputs, weights, slots, output.dtype)
    output[:, : product.shape[1]] = scaling * product


def expand(inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, add_inputs: bool = True) -> None:
    """`output += inputs @ B.T`, in the place of `bgmv_expand`."""
    width = min(weights.shape[-2], output.shape[1])  # vLLM may pad one more than the other
    expand_slice(inputs, weights[..., :width, :], output, slots, 0, width, add_inputs)


def expand_slice(
    inputs: Tensor, weights: Tensor, output: Tensor, slots: Tensor, start: int, size: int, add_inputs: bool = True
) -> None:
    """`output[:, start : start + size] += inputs @ B.T`, in the place of `bgmv_expand_slice`."""
    product = _grouped(inputs, weights, slots, output.dtype)
    if add_inputs:
        output[:, start : start + size] += product
    else:
        output[:, start : start + size] = product


def install() -> None:
    """Put these in the place of vLLM's CPU functions, for this process."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    replacements: dict[str, Any] = {"bgmv_shrink": shrink, "bgmv_expand": expand, "bgmv_expand_slice": expand_slice}
    for name, function in replacements.items():
        setattr(lora_ops, name, function)  # the sgmv_… functions (prefill) call these
        setattr(punica_cpu, name, function)
