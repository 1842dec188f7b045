"""Hidden units as low, middle or high: thresholds from running moments, states of 2 bits, the loss of leaving a state.

A unit's two *thresholds* are its mean minus and plus some standard deviations over all tokens of fixed samples. Its
*state* at a token is 0 up to the lower one, 2 from the upper one on, and 1 between them (GeRe, arXiv 2508.04676: code).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu


@dataclass(frozen=True)
class Moments:
    """Of each unit: how many values were seen, their mean and their sum of squared deviations, both float64 [units].

    Moments of parts add up to those of the whole (Chan, Golub and LeVeque 1983), without the cancellation of a
    difference between the mean square and the squared mean, which can make a variance negative.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Of `values`, [n, units]; n may be 0."""
        wide = values.double()
        mean = wide.mean(0) if len(wide) else wide.new_zeros(wide.shape[1])
        return cls(len(wide), mean, (wide - mean).square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        count = max(self.count + other.count, 1)
        gap = other.mean - self.mean
        squares = self.squares + other.squares + gap.square() * (self.count * other.count / count)
        return Moments(self.count + other.count, self.mean + gap * (other.count / count), squares)

    def packed(self) -> Tensor:
        """All in one float64 tensor [2 units + 1], for sending."""
        return torch.cat([self.mean.new_tensor([self.count]), self.mean, self.squares])

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Moments":
        """What `packed` made."""
        units = len(packed) // 2
        return cls(int(packed[0].item()), packed[1 : units + 1], packed[units + 1 :])

    def thresholds(self, sigmas: float) -> Tensor:
        """Mean minus and plus `sigmas` (population) standard deviations, float32 [2, units]."""
        spread = sigmas * (self.squares / max(self.count, 1)).sqrt()
        return torch.stack([self.mean - spread, self.mean + spread]).float()


def states(hidden: Tensor, thresholds: Tensor) -> Tensor:
    """The state of each unit, uint8 [tokens, units], for `hidden` [tokens, units]."""
    low, high = thresholds
    wide = hidden.float()
    return (wide > low).to(torch.uint8) + (wide >= high).to(torch.uint8)


def margin_loss(hidden: Tensor, kept: Tensor, thresholds: Tensor) -> Tensor:
    """How far units have left their states, a mean over those that have; 0 if none has. In float32.

    `hidden` [tokens, units] are the states now, `kept` [tokens, units] what `states` once gave. Each unit is to stay on
    the side of the thresholds on which it was (GeRe: the threshold-based margin loss of its code).
    """
    low, high = thresholds
    inf = torch.tensor(torch.inf, device=hidden.device)
    upper = torch.where(kept == 0, low, torch.where(kept == 1, high, inf))
    lower = torch.where(kept == 2, high, torch.where(kept == 1, low, -inf))
    wide = hidden.float()
    beyond = relu(wide - upper) + relu(lower - wide)
    return beyond.sum() / (beyond > 0).sum().clamp(min=1)
