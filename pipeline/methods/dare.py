"""DARE (arXiv 2311.03099, eq. 1-3): drop changes at random, rescale what stays, then merge the task vectors.

By PEFT's own functions, layer by layer: each change stays with probability `density` and is divided by it, and
vectors are added up (`signs: false`, task arithmetic) or merged as TIES does, without its trimming. What is dropped
depends on the run's seed and the layer alone. `merge: false` is neutral.
"""

import zlib

import torch
from peft.utils.merge_utils import dare_linear, dare_ties
from pydantic import Field
from torch import Tensor

from .vectors import Vectors, VectorsConfig


class DareConfig(VectorsConfig):
    """`method: {dare: {…}}`."""

    density: float = Field(default=0.1, gt=0, lt=1)  # p = 0.9 is dropped: DARE (paper)
    signs: bool = False  # whether signs are elected as in TIES


class Dare(Vectors):
    """Drop and rescale."""

    name = "dare"
    paper = "DARE, ICML 2024, arXiv 2311.03099"
    Config = DareConfig

    config: DareConfig

    def merge(self, layer: str, vectors: list[Tensor]) -> Tensor:
        rule = dare_ties if self.config.signs else dare_linear
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{self.stage.seed} {layer}".encode()))
            return rule(vectors, torch.ones(len(vectors)), self.config.density)
