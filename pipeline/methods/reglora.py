"""RegLoRA (SEFE, arXiv 2505.02486): keep each new adapter off the positions where earlier ones changed a weight most.

After a stage, the positions of the largest `key_fraction` of `|B A|` in each adapted layer become *keys* (raw `B A`,
without alpha/r). While later adapters train, the loss gains `weight` times the mean over layers of the mean of `|B A|`
over the layer's keys, as often as each was one: once per optimizer step, the layers dealt out to the processes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.data_prep.errors import InputError

from ..planning.outlook import Outlook, Passes
from ..policy.adapters import lora_layers
from .base import Method, StepView
from .keys import MeanAtKeys, add_keys, total, width

if TYPE_CHECKING:
    from peft import PeftModel


class RegLoraConfig(schema.Config):
    """`method: {reglora: {…}}`."""

    key_fraction: float = Field(default=0.02, gt=0, lt=1)  # M = 2 %: SEFE (code and ablation)
    weight: float = Field(default=2500.0, ge=0)  # lambda: SEFE (code)
    # multiset: a position that was a key k times weighs k times (SEFE's code), up to 15; union: once (SEFE's paper)
    overlap: Literal["multiset", "union"] = "multiset"

    @property
    def bits(self) -> int:
        """Of a position's count."""
        return 4 if self.overlap == "multiset" else 1


class RegLora(Method):
    """Keys of past stages, and the penalty on the current adapter there. State: packed counts (`keys.py`) by layer."""

    name = "reglora"
    paper = "SEFE, ICML 2025, arXiv 2505.02486"
    category = "regularisation"
    keeps = "nothing"
    cost = "4 bits an adapted weight; once per step the product of its factors, and its gradients"
    lineages = ("stack", "fold")
    needs_lora = True
    Config = RegLoraConfig
    neutral = {"weight": 0}  # noqa: RUF012

    config: RegLoraConfig

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        """Raises `InputError` for counts of another size."""
        for name, a, b, _ in lora_layers(model):
            shape = b.shape[0], width(a.shape[1], self.config.bits)
            if self.config.weight and name in state and state[name].shape != shape:
                raise InputError(
                    f"the keys of {name} are {tuple(state[name].shape)} bytes, not {shape}",
                    where="recipe",
                    field="method.reglora.overlap",
                    remedy="Keep it as it was in the stages before",
                )
        self.counts = state
        self.share: dict[str, tuple[Tensor, int]] | None = None

    def loss(self, view: StepView) -> Tensor | None:
        if not (view.last and self.counts and self.config.weight):
            return None
        layers = {name: (a, b) for name, a, b, _ in lora_layers(view.model)}
        device = next(iter(layers.values()))[0].device
        if self.share is None:
            sizes = {name: self.counts[name].numel() for name in layers if name in self.counts}
            mine = deal(sizes, view.processes)[view.process]
            self.share = {
                name: (self.counts[name].to(device), total(self.counts[name], self.config.bits)) for name in mine
            }
        penalty = torch.zeros((), device=device)
        for name, (packed, keys) in self.share.items():
            if keys:
                penalty = penalty + MeanAtKeys.apply(*layers[name], packed, self.config.bits, keys)
        return self.config.weight * view.processes / len(layers) * penalty

    def disk(self, outlook: Outlook) -> int:
        if not self.config.weight:
            return 0
        return sum(rows * width(columns, self.config.bits) for rows, columns in outlook.shapes.values())

    def memory(self, outlook: Outlook) -> float:
        """The counts, dealt out to the processes."""
        return self.disk(outlook) / outlook.processes if outlook.stages > 1 else 0

    def passes(self, outlook: Outlook) -> Passes:
        """The penalty forms `B A` twice, forward and backward, and two gradients: 8 r operations a weight of the layer.

        A token takes 4 of a frozen weight. As if every weight that a token meets were in an adapted layer.
        """
        if not self.config.weight or outlook.stages == 1:
            return Passes()
        return Passes(products=2 * outlook.stage.train.lora.r * outlook.steps)

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        fraction, bits = self.config.key_fraction, self.config.bits
        new = {name: add_keys(self.counts.get(name), a, b, fraction, bits) for name, a, b, _ in lora_layers(model)}
        return self.counts | new


def deal(sizes: Mapping[str, int], hands: int) -> list[list[str]]:
    """The names in `hands` parts of about the same total size: the largest first, each to the part that has least."""
    parts: list[list[str]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
        least = loads.index(min(loads))
        parts[least].append(name)
        loads[least] += sizes[name]
    return parts
