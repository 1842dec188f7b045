"""EWC, online (arXiv 1612.00796, eq. 3; arXiv 1805.06370, eq. 8-10): weights that past answers hang on are held.

The importance of a weight is the diagonal of the empirical Fisher information, Ω = mean over samples of (∂ log
p(y|x))², y being the whole answer; a stage's is added to `decay` times what there was. `weight: 0` is neutral.
"""

from pydantic import Field
from torch import Tensor, nn

from ..training.collator import IGNORED
from .importance import Importance, ImportanceConfig
from .outputs import answer_loss


class EwcConfig(ImportanceConfig):
    """`method: {ewc: {…}}`."""

    weight: float = Field(
        default=1000.0, ge=0
    )  # 1e3: MLLM-CTBench (code, Qwen2.5-VL with LoRA), with its normalisation


class Ewc(Importance):
    """Elastic weight consolidation."""

    name = "ewc"
    paper = "EWC, PNAS 2017, arXiv 1612.00796; online: Progress & Compress, ICML 2018, arXiv 1805.06370"
    conflicts = ("mas",)
    Config = EwcConfig
    neutral = {"weight": 0}  # noqa: RUF012

    def of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """-log p of the answer, all its tokens."""
        return surprise(hidden, labels, self.head)

    def importance(self, gradient: Tensor) -> Tensor:
        return gradient.square()


def surprise(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """-log p of a sample's whole answer, in nats, of its last hidden states [tokens, units] and labels [tokens]."""
    return answer_loss(hidden, labels, head) * (labels[1:] != IGNORED).sum()
