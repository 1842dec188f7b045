"""HFT, half fine-tuning (arXiv 2404.18466, sec. 3): a random half of each block's matrices trains, drawn anew a stage.

By category, the paper's best: of the matrices of a block's attention a `share` is frozen, and of its MLP; where a
share is no whole number, blocks take turns (two of three in one, one of three in the next). Under lineage `full`, which
is the paper's, also of its norms; embeddings, output head and what else is outside the blocks train. On LoRA it is the
adapters of those matrices that do not train (ours). `share: 0` is neutral.
"""

import random
from collections import defaultdict
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..planning.outlook import Outlook
from .base import Method, Past
from .freeze import decoder_blocks

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from ..recipe.schema import Stage


class HftConfig(schema.Config):
    """`method: {hft: {…}}`."""

    share: float = Field(default=0.5, ge=0, lt=1)  # frozen: half, and 40 to 60 % work (second-hand)


class Hft(Method):
    """What is frozen follows from the seed and the stage."""

    name = "hft"
    paper = "HFT, ACL 2025, arXiv 2404.18466"
    category = "schedule"
    keeps = "nothing"
    cost = "none; less memory and time for what does not train"
    lineages = (*Method.lineages, "full")
    conflicts = ("freeze",)
    Config = HftConfig
    neutral = {"share": 0}  # noqa: RUF012

    config: HftConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.rng = random.Random(f"hft {stage.seed} {stage.k}")
        return samples

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        kinds: dict[tuple[str, int], list[list[str]]] = defaultdict(list)
        for block in decoder_blocks(model):
            for category, matrices in sorted(categories(block).items()):
                kinds[category, len(matrices)].append([f"{id(block)} {name}" for name in matrices])
        frozen = {name for groups in kinds.values() for name in drawn(groups, self.config.share, self.rng)}
        for block in decoder_blocks(model):
            for name, parameter in block.named_parameters():
                if f"{id(block)} {matrix(name)}" in frozen:
                    parameter.requires_grad_(False)

    def trains(self, outlook: Outlook) -> int | None:
        """About: which matrices are frozen is drawn, and they are not equally large."""
        whole = outlook.stage.train.lineage == "full"
        drawn_from = (
            sum(one.numel() for one in outlook.model.get_decoder().layers.parameters()) if whole else outlook.lora
        )
        return outlook.trained - round(self.config.share * drawn_from)


def matrix(parameter: str) -> str:
    """The layer that a parameter of a block belongs to: `mlp.up_proj` of `mlp.up_proj.lora_A.default.weight`."""
    return parameter.partition(".lora_")[0] if ".lora_" in parameter else parameter.rpartition(".")[0]


def categories(block: "nn.Module") -> dict[str, list[str]]:
    """The layers of a block that train: matrices by what they are part of (`self_attn`, `mlp`), and `norms`."""
    dimensions: dict[str, int] = defaultdict(int)
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            dimensions[matrix(name)] = max(dimensions[matrix(name)], parameter.ndim)
    found: dict[str, list[str]] = defaultdict(list)
    for layer, count in dimensions.items():
        found[layer.rpartition(".")[0] if count > 1 else "norms"].append(layer)
    return found


def drawn(groups: list[list[str]], share: float, rng: random.Random) -> list[str]:
    """A `share` of each of equally large groups, and of all together, to within one."""
    chosen: list[str] = []
    for number, group in enumerate(rng.sample(groups, len(groups)), 1):
        chosen += rng.sample(group, round(number * share * len(group)) - len(chosen))
    return chosen
