"""TIES (arXiv 2306.01708, sec. 4): trim each task vector, elect each weight's sign, average those that agree with it.

By PEFT's own function, layer by layer (the paper trims over all layers together): of each vector the `density`
largest changes stay, the sign of a weight is that of their sum, and the result is the mean of those with that sign,
times `scale`. `merge: false` is neutral.
"""

import torch
from peft.utils.merge_utils import ties
from pydantic import Field
from torch import Tensor

from .vectors import Vectors, VectorsConfig


class TiesConfig(VectorsConfig):
    """`method: {ties: {…}}`."""

    density: float = Field(default=0.2, gt=0, lt=1)  # the top 20 %: TIES (paper)


class Ties(Vectors):
    """Trim, elect sign and merge."""

    name = "ties"
    paper = "TIES-Merging, NeurIPS 2023, arXiv 2306.01708"
    Config = TiesConfig

    config: TiesConfig

    def merge(self, layer: str, vectors: list[Tensor]) -> Tensor:
        return ties(vectors, torch.ones(len(vectors)), self.config.density)
