"""MAS (arXiv 1711.09601, eq. 3): weights that the outputs react to most stay where they are, whatever the labels are.

The importance of a weight is Ω = mean over samples of |∂ ‖F(x)‖²|, F being the logits of the answer's tokens (a mean
over them). A stage's is added to `decay` times what there was. `weight: 0` is neutral.
"""

from pydantic import Field
from torch import Tensor

from ..training.collator import IGNORED
from .importance import Importance, ImportanceConfig
from .outputs import logits


class MasConfig(ImportanceConfig):
    """`method: {mas: {…}}`."""

    weight: float = Field(default=100.0, ge=0)  # 1e2: MLLM-CTBench (code, Qwen2.5-VL with LoRA), with its normalisation


class Mas(Importance):
    """Memory aware synapses."""

    name = "mas"
    paper = "MAS, ECCV 2018, arXiv 1711.09601"
    conflicts = ("ewc",)
    Config = MasConfig
    neutral = {"weight": 0}  # noqa: RUF012

    def of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """The squared norm of the logits, a mean over the answer's tokens."""
        return logits(hidden[:-1][labels[1:] != IGNORED], self.head).square().sum(-1).mean()

    def importance(self, gradient: Tensor) -> Tensor:
        return gradient.abs()
