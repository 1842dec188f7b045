"""Weights between the base and the tuned policy (WiSE-FT, arXiv 2109.01903, eq. 1): θ = (1 − share) θ_base + share θ.

Only what is evaluated: the next stage goes on from the tuned policy itself. On LoRA it is exact, the adapter times
`share`. `share: 1` is neutral.
"""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.eval.lora import Adapter

from ..planning.outlook import FLOAT, Outlook
from ..policy.adapters import scaled
from .base import Method


class InterpolateConfig(schema.Config):
    """`method: {interpolate: {…}}`."""

    share: float = Field(default=0.5, gt=0, le=1)  # of the tuned policy: 0.5, WiSE-FT where nothing is tuned (paper)


class Interpolate(Method):
    """A baseline that costs nothing."""

    name = "interpolate"
    paper = "WiSE-FT, CVPR 2022, arXiv 2109.01903"
    category = "bound"
    keeps = "nothing"
    cost = "none; a second adapter on disk"
    needs_lora = True
    Config = InterpolateConfig
    neutral = {"share": 1}  # noqa: RUF012

    config: InterpolateConfig

    def disk(self, outlook: Outlook) -> int:
        return 0 if self.config.share == 1 else FLOAT * outlook.rank * outlook.width

    def served(self, policy: Adapter, state: Mapping[str, Tensor]) -> Adapter | None:
        return None if self.config.share == 1 else scaled(policy, self.config.share)
