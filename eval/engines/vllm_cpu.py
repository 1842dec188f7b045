"""vLLM on a CPU: its LoRA arithmetic, made right and fast, and its threads.

vLLM 0.31 multiplies each token with a copy of its adapter's factors, so that a batch of T tokens gathers
[T, out, max_lora_rank] numbers for every layer: hundreds of megabytes for rank 128 even in a tiny model. Worse, it
looks tokens without an adapter up at index -1, which is the last adapter slot: the base model answers with somebody's
adapter as soon as all slots are taken. Here the tokens of an adapter are multiplied together, with factors of its own
rank, and tokens without one are left alone. (LoRA on embeddings, which mcit does not train, is as vLLM has it.)
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SMALL = 50 * 2**20  # bytes of weights, so few that threads wait for each other longer than they work
Blocks = list[tuple[int, Tensor]]  # (adapter slot, which tokens are its)
Ranks = dict[tuple[int, int], int]  # by (where a part's A is, adapter slot)


def blocks(slots: Tensor) -> Blocks:
    """The tokens of each slot. `slots` has a slot for each token, negative where it has no adapter."""
    return [(slot, (slots == slot).nonzero()[:, 0]) for slot in slots.unique().tolist() if slot >= 0]


def add_products(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    widths: Sequence[int],
    found: Blocks,
    scale: float,
    ranks: Ranks,
) -> None:
    """`y[t] += scale * B A x[t]` with the factors of token t's slot, part after part of y, in place.

    x [tokens, in], y [tokens, Σ widths]; of every part a [slots, (1,) max_rank, in], b [slots, (1,) width, max_rank].
    `A x` is in float32, as in vLLM's kernels for GPUs. `ranks` remembers how far the slots of these parts are filled.
    """
    for slot, tokens in found:
        own, products = x[tokens].float(), []
        for down, up, width in zip(a, b, widths, strict=True):
            rank = ranks.get((down.data_ptr(), slot))
            if rank is None:
                rank = ranks[down.data_ptr(), slot] = filled(down[slot].squeeze(0))
            low = scale * (own @ down[slot].squeeze(0)[:rank].float().T)
            products.append(low.to(y.dtype) @ up[slot].squeeze(0)[:width, :rank].to(y.dtype).T)
        y[:, : sum(one.shape[1] for one in products)].index_add_(0, tokens, torch.cat(products, 1))


def filled(a: Tensor) -> int:
    """The rank of an adapter in a slot for larger ones: `a` [max_rank, in] is zero behind it."""
    rows = a.any(1).nonzero()
    return int(rows[-1]) + 1 if len(rows) else 0


def use_threads(model: Path) -> None:
    """Run a small model in one thread, on any core: vLLM takes all cores, and every operation ends with a wait.

    For this process, before vLLM starts. A user's own VLLM_CPU_OMP_THREADS_BIND wins.
    """
    name = "VLLM_CPU_OMP_THREADS_BIND"
    if name not in os.environ and sum(file.stat().st_size for file in model.glob("*.safetensors")) < _SMALL:
        os.environ[name] = "nobind"
        torch.set_num_threads(1)


def install() -> None:
    """Put these in the place of vLLM's CPU functions, for this process."""
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    torch._dynamo.config.disable = True  # all that vLLM would compile here is how it gathers log-probabilities

    def update_metadata(self: Any, mapping: Any, ids: list[int | None], *args: Any, **kwargs: Any) -> None:
        PunicaWrapperBase.update_metadata(self, mapping, ids, *args, **kwargs)
        self.blocks = blocks(self.token_lora_indices)  # once for all layers
        if ids != getattr(self, "ids", None):  # whose adapter is in which slot
            self.ids, self.ranks = [*ids], {}

    def add_lora_linear(
        self: Any, y: Tensor, x: Tensor, a: Any, b: Any, scale: float, output_slices: Any, **unused: Any
    ) -> None:
        rows, inputs = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        add_products(rows, inputs, a, b, output_slices, self.blocks, scale, self.ranks)

    def add_lora_logits(self: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, **unused: Any) -> None:
        rows, inputs, found = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), blocks(self.sampler_indices)
        add_products(rows, inputs, [a], [b], [y.shape[-1]], found, scale, self.ranks)

    for function in (update_metadata, add_lora_linear, add_lora_logits):
        setattr(PunicaWrapperCPU, function.__name__, function)
