"""Muon (Jordan et al., 2024): momentum whose matrix is orthogonalised before it is applied.

`torch.optim.Muon` orthogonalises in bfloat16, which on processors without it takes longer than the rest of a step; this
does so in float32, the same shapes together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic of Newton–Schulz that brings every singular value near 1 in five rounds.
A, B, C, ROUNDS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """For the weight matrices of layers. A square matrix of width w moves by `lr` / w^½ (root mean square) a step.

    Steps of a fixed length make weights grow with noise until a step no longer changes much; `decay`, a share of `lr`,
    holds them (Liu et al., 2025, "Muon is scalable for LLM training").
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes = defaultdict(list)
            for matrix in group["params"]:
                shapes[matrix.shape].append(matrix)
            for (rows, columns), matrices in shapes.items():
                updates = torch.stack([self._direction(matrix, group["momentum"]) for matrix in matrices])
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(matrices, orthogonalise(updates), strict=True):
                    matrix.mul_(1 - group["lr"] * group["decay"]).sub_(update, alpha=rate)

    def _direction(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum."""
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices, roughly, whose singular values are all 1; [n, rows, columns]."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return x.mT if tall else x
