"""Freezing: only part of the language model's blocks trains, the first ones or the last ones.

MLLM-CTBench's `freeze_last` trains the LoRA of the first half of the blocks (its LLaVA variant of the same name
trains the projector alone: another method). `share: 1` is neutral.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor, nn

from mcit.data_prep import schema

from ..planning.outlook import Outlook
from ..training.replay import unwrapped
from .base import Method

if TYPE_CHECKING:
    from peft import PeftModel


class FreezeConfig(schema.Config):
    """`method: {freeze: {…}}`."""

    blocks: Literal["first", "last"] = "first"  # those that train; first: MLLM-CTBench (code)
    share: float = Field(default=0.5, gt=0, le=1)  # of the blocks, rounded, at least one: MLLM-CTBench (code)


class Freeze(Method):
    """The LoRA of the other blocks stays what it is: nothing, or what the stage entered with."""

    name = "freeze"
    paper = "MLLM-CTBench, arXiv 2508.08275 (code)"
    category = "architecture"
    keeps = "nothing"
    cost = "none; less memory and time for what does not train"
    Config = FreezeConfig
    neutral = {"share": 1}  # noqa: RUF012

    config: FreezeConfig

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        for block in self._frozen(model):
            block.requires_grad_(False)

    def trains(self, outlook: Outlook) -> int | None:
        frozen = {module for block in self._frozen(outlook.model) for module in block.modules()}
        trained = [name for name in outlook.shapes if outlook.model.get_submodule(name) not in frozen]
        return outlook.stage.train.lora.r * sum(sum(outlook.shapes[name]) for name in trained)

    def _frozen(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that do not train."""
        blocks = decoder_blocks(model)
        count = max(1, round(self.config.share * len(blocks)))
        return blocks[count:] if self.config.blocks == "first" else blocks[:-count]


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The language model's blocks, in order."""
    return list(unwrapped(model).get_decoder().layers)
