"""L2P-style prompts (arXiv 2112.08654, eq. 4-5): a pool of prompts of which each question picks those nearest to it.

    loss gains  weight · mean over samples of (1 − cosine of the question to the keys of the `top` prompts it picks)

Only the pool trains, under every stage the same one (`continue`). The question is the mean of its own input
embeddings, images included, where the paper has a second, frozen network (ours: a language model reads the question
anyway). Of MLLM-CTBench's two variants, the one for LLaVA is this; in the one for Qwen2.5-VL the prompts are never
put in. `pool: 0` is neutral: then LoRA trains.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from mcit.data_prep import schema
from mcit.eval.extension import add_prompts, save_extension

from ..planning.outlook import FLOAT, Outlook
from ..training.collator import IGNORED
from .base import Method, StepView

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..training.collator import Collator


class L2PConfig(schema.Config):
    """`method: {l2p: {…}}`."""

    pool: int = Field(default=64, ge=0)  # prompts: MLLM-CTBench (code, LLaVA)
    length: int = Field(default=16, gt=0)  # vectors of a prompt: MLLM-CTBench (code, LLaVA)
    top: int = Field(default=4, gt=0)  # prompts that a question picks: MLLM-CTBench (code, LLaVA)
    weight: float = Field(default=0.2, ge=0)  # lambda: MLLM-CTBench (code, LLaVA)

    @model_validator(mode="after")
    def _enough(self) -> "L2PConfig":
        if self.pool and self.top > self.pool:
            raise PydanticCustomError("l2p", "`top` is more than there are in the `pool`")
        return self


class L2P(Method):
    """State: keys and prompts. It is served by transformers."""

    name = "l2p"
    paper = "L2P, CVPR 2022, arXiv 2112.08654"
    category = "architecture"
    keeps = "nothing"
    cost = "`top` x `length` more tokens a question; evaluation by transformers instead of vLLM"
    lineages = ("continue",)
    paradigms = ("sft",)
    distributed = ("single", "ddp", "zero2")
    conflicts = ("freeze", "hft")
    packs = False
    carried_as = "extended"
    Config = L2PConfig
    neutral: ClassVar[dict[str, Any]] = {"pool": 0}

    config: L2PConfig

    @property
    def carries(self) -> bool:
        return self.config.pool > 0

    def enter(self, model: "PreTrainedModel", state: dict[str, Tensor], collator: "Collator") -> "PreTrainedModel":
        model.requires_grad_(False)
        self.pool = add_prompts(model, state or self._fresh(model.get_input_embeddings().weight), self.config.top)
        return model

    def loss(self, view: StepView) -> Tensor | None:
        if not (self.carries and self.config.weight):
            return None
        assert self.pool.likeness is not None
        learned = (view.inputs["labels"] != IGNORED).any(1)
        if not learned.any():
            return self.pool.likeness.new_zeros(())
        return self.config.weight * view.share * (1 - self.pool.likeness[learned]).mean()

    def trains(self, outlook: Outlook) -> int | None:
        units = outlook.model.config.get_text_config().hidden_size
        return self.config.pool * (1 + self.config.length) * units if self.carries else None

    def disk(self, outlook: Outlook) -> int:
        """The state, and the policy, which is the same."""
        return 2 * FLOAT * (self.trains(outlook) or 0)

    def finish(self, model: Any, samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.carries:
            return {}
        parts = {"keys": self.pool.keys, "prompts": self.pool.prompts}
        return {name: part.detach().to("cpu", torch.float32, copy=True) for name, part in parts.items()}

    def leave(self, model: "PreTrainedModel", processor: Any, folder: Path) -> None:
        save_extension(folder, {"kind": "prompts", "top": self.config.top}, self.finish(model, []))

    def _fresh(self, embeddings: Any) -> dict[str, Tensor]:
        """Keys at random (uniform in ±1: the paper's code), prompts of random tokens' embeddings (ours)."""
        tokens = torch.randint(len(embeddings), (self.config.pool, self.config.length))
        keys = torch.empty(self.config.pool, embeddings.shape[1]).uniform_(-1, 1)
        return {"keys": keys, "prompts": embeddings[tokens].detach().float()}
