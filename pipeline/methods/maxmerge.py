"""Max-merge as MLLM-CTBench's code has it (arXiv 2508.08275): the element-wise maximum of all stages' LoRA factors.

A = max_k A_k and B = max_k B_k, signs and all, of adapters that were each tuned from the base. The paper calls it
MagMaX, which takes the largest *magnitude* of the *weights'* changes: the maximum of A and of B is not that of B A
(`magmax` is the published method). `merge: false` is neutral.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mcit.eval.lora import Adapter, Dense, Factors

from ..planning.outlook import FLOAT, Outlook
from .vectors import Vectors, VectorsConfig, adapters


class MaxMergeConfig(VectorsConfig):
    """`method: {maxmerge: {…}}`."""


class MaxMerge(Vectors):
    """Maximum of factors. It stays a LoRA of the same rank."""

    name = "maxmerge"
    paper = "MLLM-CTBench, arXiv 2508.08275 (code)"
    lineages = ("independent",)
    Config = MaxMergeConfig

    def merged_bytes(self, outlook: Outlook) -> int:
        return FLOAT * outlook.lora

    def served(self, policy: Adapter, state: Mapping[str, Tensor]) -> Mapping[str, Factors | Dense] | None:
        if not self.config.merge:
            return None
        tuned = adapters(state)
        scale = self.config.scale
        return {
            name: Factors(
                torch.stack([one[name].a for one in tuned]).amax(0),
                scale * torch.stack([one[name].b for one in tuned]).amax(0),
                1.0,
            )
            for name in policy
        }
