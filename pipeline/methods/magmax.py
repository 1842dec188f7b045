"""MagMaX (arXiv 2407.06322, sec. 3): of the task vectors of sequential tuning, each weight takes the largest change.

    τ = the τ_k whose |τ_k| is largest, weight by weight;   what is evaluated is θ_base + scale · τ

with τ_k = θ_k − θ_base. Of equals the later one, as in the authors' code. `merge: false` is neutral.
"""

import torch
from pydantic import Field
from torch import Tensor

from .vectors import Vectors, VectorsConfig


class MagMaxConfig(VectorsConfig):
    """`method: {magmax: {…}}`."""

    scale: float = Field(default=0.5, ge=0)  # lambda: MagMaX (code)


class MagMax(Vectors):
    """Maximum magnitude selection."""

    name = "magmax"
    paper = "MagMaX, ECCV 2024, arXiv 2407.06322"
    Config = MagMaxConfig

    def merge(self, layer: str, vectors: list[Tensor]) -> Tensor:
        largest = vectors[0]
        for vector in vectors[1:]:
            largest = torch.where(vector.abs() >= largest.abs(), vector, largest)
        return largest
