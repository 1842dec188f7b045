"""O-LoRA (arXiv 2310.14152, eq. 7-8): each stage's LoRA learns in a subspace orthogonal to those of the stages before.

The loss gains `weight` times the sum over layers of |A_i A_tᵀ| over all entries and past stages i, whose A are kept.
The paper's equation squares the entries, its code takes their absolute values; the published weights go with the
code's (`norm: l1`). The code's second term, a weight decay on the new LoRA, has weight 0 in its scripts and is left
to the optimizer. `weight: 0` is neutral.
"""

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..planning.outlook import FLOAT, Outlook
from ..policy.adapters import lora_layers
from .base import Method, StepView

if TYPE_CHECKING:
    from peft import PeftModel


class OLoraConfig(schema.Config):
    """`method: {olora: {…}}`."""

    weight: float = Field(default=0.5, ge=0)  # lambda_1: O-LoRA (code)
    norm: Literal["l1", "l2"] = "l1"  # l1: O-LoRA (code); l2: its equation 8


class OLora(Method):
    """State: the A of all past stages by layer, [stages · rank, in]."""

    name = "olora"
    paper = "O-LoRA, EMNLP Findings 2023, arXiv 2310.14152"
    category = "architecture"
    keeps = "nothing"
    cost = "half of every past adapter in memory and on disk; once per step, products of the size of the ranks"
    lineages = ("stack", "fold")
    needs_lora = True
    Config = OLoraConfig
    neutral = {"weight": 0}  # noqa: RUF012

    config: OLoraConfig

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.past = state

    def loss(self, view: StepView) -> Tensor | None:
        if not (view.last and self.past and self.config.weight):
            return None
        terms = []
        for name, a, _, _ in lora_layers(view.model):
            if name in self.past:
                self.past[name] = self.past[name].to(a.device)
                terms.append(overlap(self.past[name], a.float(), self.config.norm))
        return self.config.weight * torch.stack(terms).sum()

    def disk(self, outlook: Outlook) -> int:
        columns = sum(columns for _, columns in outlook.shapes.values())
        return FLOAT * outlook.rank * columns if self.config.weight else 0

    def memory(self, outlook: Outlook) -> float:
        """The A of earlier stages, of which the policy's rank is the sum."""
        return self.disk(outlook) * (1 - outlook.stage.train.lora.r / outlook.rank)

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        new = {name: a.detach().to("cpu", torch.float32, copy=True) for name, a, _, _ in lora_layers(model)}
        return {name: torch.cat([self.past[name].cpu(), a]) if name in self.past else a for name, a in new.items()}


def overlap(past: Tensor, a: Tensor, norm: str) -> Tensor:
    """Σ |past aᵀ|, or of the squares, for rows [n, in] and [r, in]."""
    products = past @ a.T
    return products.abs().sum() if norm == "l1" else products.square().sum()
