"""Experts added to a layer's mixture: beside it while they train, in its tensors afterwards.

transformers keeps a layer's experts in two tensors and a router's rows in one. In both kinds of block here a token's k
largest logits are its experts, weighted by a softmax over those k: of all experts, then divided by their sum.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

NOISE = 0.02  # of a new row, as a share of a router's rows; where these are zero, as it is (a usual start): ours


class Added(NamedTuple):
    """Experts as tensors, K of them."""

    gate_up: Tensor  # [K, 2I, H]
    down: Tensor  # [K, H, I]
    rows: Tensor  # [K, H], of the router


class ExtendedRouter(nn.Module):
    """A router with rows in training after its own, which are frozen. What it computes is the router's own affair."""

    def __init__(self, router: nn.Module, rows: Tensor):
        super().__init__()
        self.router, self.rows = router, nn.Parameter(rows)

    def forward(self, hidden_states: Tensor) -> Any:
        own: Any = self.router.weight
        weight = torch.cat([own, self.rows.to(own.dtype)])  # one product, as of the merged model
        return functional_call(self.router, {"weight": weight}, (hidden_states,))


class ExtendedExperts(nn.Module):
    """A layer's experts, frozen, and new ones in training: each through the kernel that transformers was told to use.

    The old experts get all tokens as ever, without the places that went to new ones, so that a token that chose no new
    expert is computed as before. The new ones get only those places.
    """

    def __init__(self, experts: nn.Module, added: Added):
        super().__init__()
        self.experts: Any = experts
        config: Any = copy.copy(self.experts.config)
        config.num_local_experts = len(added.rows)
        with torch.device("meta"):
            self.new: Any = type(experts)(config)
        self.new.config = self.experts.config  # both follow `set_experts_implementation`
        self.new.gate_up_proj, self.new.down_proj = nn.Parameter(added.gate_up), nn.Parameter(added.down)

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Tokens [T, H], the experts of each [T, k] and their weights [T, k] → [T, H]."""
        first = self.experts.num_experts
        added = index >= first
        # The kernels take the index after the last one for no expert. The plain loop knows no such index, and there a
        # weight of zero makes none of any expert.
        nowhere = 0 if self.experts.config._experts_implementation == "eager" else first
        result = self.experts(hidden_states, index.masked_fill(added, nowhere), weights.masked_fill(added, 0))
        token, place = added.nonzero(as_tuple=True)
        if not len(token):
            return result
        dtype = self.experts.gate_up_proj.dtype  # trained in float32, multiplied as the merged model will be
        parameters = {name: parameter.to(dtype) for name, parameter in self.new.named_parameters()}
        chosen = index[token, place, None] - first, weights[token, place, None]
        return result.index_add(0, token, functional_call(self.new, parameters, (hidden_states[token], *chosen)))


def count(block: Any) -> int:
    """How many experts a block has that nothing was added to (or merged into)."""
    return int(block.experts.num_experts)


def copies(block: Any, sources: Sequence[int]) -> Added:
    """Copies of a block's experts and of their router rows, in the order of `sources`."""
    chosen = torch.tensor(sources, device=block.gate.weight.device)
    return Added(*(tensor.detach()[chosen] for tensor in _tensors(block)))


def nudged(added: Added, block: Any) -> Added:
    """The same with a little noise on the rows. Draws from torch's global generator.

    A row that is its source's scores exactly as that does, and where only one of both is among the k largest, it is
    always the same: the new expert could wait for its first token for ever. Two copies of one expert would stay alike.
    """
    size = block.gate.weight.float().square().mean().sqrt()
    noise = NOISE * torch.randn(added.rows.shape).to(size.device) * torch.where(size > 0, size, 1.0)
    return added._replace(rows=added.rows + noise.to(added.rows.dtype))


def extend(block: Any, added: Added) -> None:
    """Put experts in training beside those of a block, which are frozen. They train in float32."""
    gate_up, down, rows = (tensor.float() for tensor in added)
    block.requires_grad_(False)
    block.experts = ExtendedExperts(block.experts, Added(gate_up, down, rows))
    block.gate = ExtendedRouter(block.gate, rows)


def trained(block: Any) -> Added | None:
    """The experts in training beside a block's own, in the block's dtype; None if there are none."""
    if not isinstance(block.experts, ExtendedExperts):
        return None
    new, dtype = block.experts.new, block.experts.experts.gate_up_proj.dtype
    return Added(*(tensor.detach().to(dtype) for tensor in (new.gate_up_proj, new.down_proj, block.gate.rows)))


def merge(block: Any) -> None:
    """Move the experts that were in training into the block's tensors, and leave the block as transformers made it."""
    added = trained(block)
    if added is not None:
        block.gate, block.experts = block.gate.router, block.experts.experts
        append(block, added)


@torch.no_grad()
def append(block: Any, added: Added) -> None:
    """Add frozen experts to a block's own tensors; the old ones keep their places and every bit."""
    gate_up, down, rows = (
        nn.Parameter(torch.cat([old, new.to(old)]), requires_grad=False)
        for old, new in zip(_tensors(block), added, strict=True)
    )
    block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight = gate_up, down, rows
    block.experts.num_experts = block.gate.num_experts = len(rows)


def _tensors(block: Any) -> Added:
    return Added(block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight)
