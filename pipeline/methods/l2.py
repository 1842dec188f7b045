"""L2 to the previous weights (L2-SP, arXiv 1802.01483, eq. 2, from stage to stage): weight / 2 · Σ ‖W − W*‖².

W are the adapted layers' weights, LoRA and all, and W* what they were as the stage began, so the term means the same
in every lineage of adapters. ‖s B A‖² is the sum of (A Aᵀ) ⊙ (s² Bᵀ B): no product of the layer's size is made. Under
`full`, as in the paper, W is everything that trains. The first stage has no past and is left alone, as in EWC and MAS.
`weight: 0` is neutral.
"""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..planning.outlook import FLOAT, Outlook
from ..policy.adapters import lora_layers
from ..training.parameters import trained_parameters
from .base import Method, StepView

if TYPE_CHECKING:
    from peft import PeftModel

    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class L2Config(schema.Config):
    """`method: {l2: {…}}`."""

    weight: float = Field(default=0.01, ge=0)  # lambda; ours, not tuned


class L2(Method):
    """Without state: what the weights were is in the entering policy."""

    name = "l2"
    paper = "L2-SP, ICML 2018, arXiv 1802.01483"
    category = "regularisation"
    keeps = "nothing"
    cost = "a copy of what trains under `continue` and `full`; once per step, products of the size of the rank"
    lineages = ("stack", "fold", "continue", "full")
    needs_lora = True
    Config = L2Config
    neutral = {"weight": 0}  # noqa: RUF012

    config: L2Config

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.given = state

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        def kept(name: str, weight: Tensor) -> Tensor:  # as the stage began, of which this may be the second phase
            return self.given.get(name, weight.detach()).to(weight, copy=True)

        self.acts = bool(self.config.weight) and entered.before.kind != "base"
        lineage = entered.stage.train.lineage if self.acts else ""
        weights = trained_parameters(entered.model) if lineage == "full" else {}
        self.whole = {name: kept(name, weight) for name, weight in weights.items()}
        # In the other lineages B is zero, and so is what the adapter adds.
        layers = lora_layers(entered.model) if lineage == "continue" else []
        self.start = {name: (kept(f"{name}.a", a), kept(f"{name}.b", b)) for name, a, b, _ in layers}

    def hand_over(self) -> dict[str, Tensor]:
        factors = {
            f"{name}.{part}": one for name, pair in self.start.items() for part, one in zip("ab", pair, strict=True)
        }
        return {name: weight.cpu() for name, weight in (self.whole | factors).items()}

    def loss(self, view: StepView) -> Tensor | None:
        if not (self.acts and view.last):
            return None
        if self.whole:
            weights = trained_parameters(view.model)
            moved = [(weights[name].float() - start.float()).square().sum() for name, start in self.whole.items()]
        else:
            moved = [squared_norm(*self._moved(name, a, b), scaling) for name, a, b, scaling in lora_layers(view.model)]
        return self.config.weight / 2 * torch.stack(moved).sum()

    def memory(self, outlook: Outlook) -> float:
        return FLOAT * outlook.trained if self.config.weight and outlook.resumes else 0

    def _moved(self, name: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of what the stage has changed: b a − b* a* = (b − b*) a + b* (a − a*), which loses no digits."""
        if name not in self.start:
            return a, b
        a_start, b_start = self.start[name]
        return torch.cat([a, a - a_start]), torch.cat([b - b_start, b_start], dim=1)


def squared_norm(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """‖scaling · b a‖², for a [r, in] and b [out, r], in float32."""
    a, b = a.float(), b.float()
    return scaling**2 * ((a @ a.T) * (b.T @ b)).sum()
