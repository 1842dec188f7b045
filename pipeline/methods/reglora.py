"""RegLoRA (SEFE, arXiv 2505.02486): keep each new adapter off the positions where earlier ones changed a weight most.

After a stage, the positions of the largest `key_fraction` of `|B A|` in each adapted layer become *keys* (raw `B A`,
without alpha/r). While later adapters train, the loss gains `weight` times the mean over layers of the mean of `|B A|`
over the layer's keys. This is the plain dense form: `B A` of every layer is built once per optimizer step.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..adapters import lora_layers
from .base import Method, StepView

if TYPE_CHECKING:
    from peft import PeftModel


class RegLoraConfig(schema.Config):
    """`method: {reglora: {…}}`."""

    key_fraction: float = Field(default=0.02, gt=0, lt=1)  # M = 2 %: SEFE (code and ablation)
    weight: float = Field(default=2500.0, ge=0)  # lambda: SEFE (code)
    # multiset: a position that was a key k times weighs k times (SEFE's code); union: once (SEFE's paper)
    overlap: Literal["multiset", "union"] = "multiset"


class RegLora(Method):
    """Keys of past stages, and the penalty on the current adapter there."""

    name = "reglora"
    paper = "SEFE, ICML 2025, arXiv 2505.02486"
    category = "regularisation"
    keeps = "nothing"
    lineages = ("stack", "fold")
    Config = RegLoraConfig
    neutral = {"weight": 0}  # noqa: RUF012

    config: RegLoraConfig

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.counts = state

    def loss(self, view: StepView) -> Tensor | None:
        if not (view.last and self.counts and self.config.weight):
            return None
        return self.config.weight * penalty(((n, a, b) for n, a, b, _ in lora_layers(view.model)), self.counts)

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        counts = dict(self.counts)
        for name, a, b, _ in lora_layers(model):
            counts[name] = add_keys(counts.get(name), key_mask(a, b, self.config.key_fraction), self.config.overlap)
        return counts


def key_mask(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """The `int(fraction * numel)` positions of largest `|b a|`, as bool [out, in] on the CPU. Zeros are never keys.

    `a` is [r, in], `b` [out, r].
    """
    with torch.no_grad():
        size = (b.float() @ a.float()).abs()
        mask = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
        mask[size.flatten().topk(int(fraction * size.numel())).indices] = True
        return (mask.view_as(size) & (size > 0)).cpu()


def add_keys(counts: Tensor | None, mask: Tensor, overlap: str) -> Tensor:
    """Join new keys, bool [out, in], to the old: uint8 counts (multiset; they stop at 255) or bool (union)."""
    if overlap == "union":
        return mask if counts is None else counts.bool() | mask
    return mask.to(torch.uint8) if counts is None else counts.to(torch.uint8) + (mask & (counts < 255))


def penalty(factors: Iterable[tuple[str, Tensor, Tensor]], counts: Mapping[str, Tensor]) -> Tensor:
    """Mean over all layers of `sum(count * |b a|) / sum(count)`; a layer without keys adds zero. In float32.

    `factors` are (name, a [r, in], b [out, r]), `counts` [out, in] by name. Formula: SEFE's code, research of its
    `LlamaDecoderLayer.forward`, with the number of layers in place of its literal 224.
    """
    terms = []
    for name, a, b in factors:
        term = b.new_zeros((), dtype=torch.float32)
        if name in counts:
            count = counts[name].to(b.device)
            with torch.autocast(b.device.type, enabled=False):
                term = (count * (b.float() @ a.float()).abs()).sum() / count.sum().clamp(min=1)
        terms.append(term)
    return torch.stack(terms).mean()
