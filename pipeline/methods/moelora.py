"""MoELoRA as CoIN has it (arXiv 2403.08350, sec. 4): each adapted layer has LoRA experts and a router of its own.

    y = W x + alpha / r · Σ_e softmax(router x)_e B_e A_e x

All `experts` act on every token; they share out the rank `train.lora.r` (rounded down), so that MoELoRA has as many
weights as LoRA, and its routers. One mixture trains on through all stages (`continue`). Unlike CoIN's code, in which
merging is commented out and said to be done all the same, nothing is ever merged: the weights depend on the token.
`experts: 0` is neutral.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from mcit.data_prep import schema
from mcit.data_prep.errors import InputError
from mcit.eval.extension import add_mixtures, save_extension

from ..planning.outlook import FLOAT, Outlook
from ..policy.lineage import target_names
from .base import Method, Past

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe.schema import Stage
    from ..training.collator import Collator


class MoELoraConfig(schema.Config):
    """`method: {moelora: {…}}`. Rank, alpha and dropout are those of `train.lora`."""

    experts: int = Field(default=8, ge=0)  # CoIN (code); 6 or 5 in MCITlib (code)


class MoELora(Method):
    """State: experts and routers, by layer. It is served by transformers."""

    name = "moelora"
    paper = "CoIN, NeurIPS 2024, arXiv 2403.08350"
    category = "architecture"
    keeps = "nothing"
    cost = "a router a layer beside a LoRA; evaluation by transformers instead of vLLM"
    lineages = ("continue",)
    paradigms = ("sft",)
    distributed = ("single", "ddp", "zero2")
    carried_as = "extended"
    Config = MoELoraConfig
    neutral: ClassVar[dict[str, Any]] = {"experts": 0}

    config: MoELoraConfig

    @property
    def carries(self) -> bool:
        return self.config.experts > 0

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.train = stage.train
        return samples

    def enter(self, model: "PreTrainedModel", state: dict[str, Tensor], collator: "Collator") -> "PreTrainedModel":
        model.requires_grad_(False)
        lora = self.train.lora
        if lora.r < self.config.experts:
            problem = f"rank {lora.r} cannot be shared out to {self.config.experts} experts"
            raise InputError(problem, where="recipe", field="method.moelora.experts")
        names = target_names(model, self.train.modules)
        tensors = state or fresh(
            {name: model.get_submodule(name).weight for name in names},
            lora.r // self.config.experts,
            self.config.experts,
        )
        self.layers = add_mixtures(model, tensors, lora.alpha / lora.r)
        for layer in self.layers.values():
            layer.dropout = nn.Dropout(lora.dropout)
        return model

    def trains(self, outlook: Outlook) -> int | None:
        if not self.carries:
            return None
        rank = outlook.stage.train.lora.r // self.config.experts * self.config.experts
        return sum(rank * (rows + columns) + self.config.experts * columns for rows, columns in outlook.shapes.values())

    def disk(self, outlook: Outlook) -> int:
        """The state, and the policy, which is the same."""
        return 2 * FLOAT * (self.trains(outlook) or 0)

    def finish(self, model: Any, samples: list[schema.Sample]) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": getattr(layer, part).detach().to("cpu", torch.float32, copy=True)
            for name, layer in (self.layers if self.carries else {}).items()
            for part in ("a", "b", "router")
        }

    def leave(self, model: "PreTrainedModel", processor: Any, folder: Path) -> None:
        scaling = self.train.lora.alpha / self.train.lora.r
        save_extension(folder, {"kind": "mixture", "scaling": scaling}, self.finish(model, []))


def fresh(weights: dict[str, Any], rank: int, experts: int) -> dict[str, Tensor]:
    """Untrained experts of `rank` each, as LoRA is: A and the router drawn uniformly, B zero."""
    tensors = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        tensors[f"{name}.a"] = nn.init.kaiming_uniform_(torch.empty(experts * rank, columns), a=5**0.5)
        tensors[f"{name}.b"] = torch.zeros(rows, experts * rank)
        tensors[f"{name}.router"] = nn.init.kaiming_uniform_(torch.empty(experts, columns), a=5**0.5)
    return tensors
