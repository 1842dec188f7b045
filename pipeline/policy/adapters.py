"""LoRA adapters in training: the live factors, policies added up, and PEFT folders written."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from mcit.eval.lora import PREFIX, WEIGHTS, Adapter, Factors

from ..training.zero3 import gather


def lora_layers(model: PeftModel, adapter: str = "default") -> list[tuple[str, Tensor, Tensor, float]]:
    """The live factors of `adapter`: (module name in the base model, A [r, in], B [out, r], scaling).

    They are whole under ZeRO-3 too, for which all processes call this together.
    """
    layers = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            a, b = cast(nn.Linear, module.lora_A[adapter]), cast(nn.Linear, module.lora_B[adapter])
            layers.append((name, a.weight, b.weight, module.scaling[adapter]))
    gather(factor for _, a, b, _ in layers for factor in (a, b))
    return layers


def live_adapter(model: PeftModel, adapter: str = "default") -> Adapter:
    """A copy of a live adapter's factors, on the CPU."""
    return {
        name: Factors(a.detach().to("cpu", torch.float32, copy=True), b.detach().to("cpu", torch.float32, copy=True), s)
        for name, a, b, s in lora_layers(model, adapter)
    }


def rank(adapter: Adapter) -> int:
    """The largest rank of any module."""
    return max((factors.a.shape[0] for factors in adapter.values()), default=0)


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter that adds `factor` times what `adapter` does."""
    return {name: Factors(a, factor * b, scaling) for name, (a, b, scaling) in adapter.items()}


def negate(adapter: Adapter) -> Adapter:
    """The adapter that undoes `adapter`."""
    return scaled(adapter, -1)


def concat(adapters: Sequence[Adapter]) -> Adapter:
    """The sum of adapters as one: ranks add up, each scaling goes into B, and the result's scaling is 1.

    A module that an adapter lacks counts as zero, so that every module of the result has the same rank.
    """
    ranks = [rank(adapter) for adapter in adapters]
    total: Adapter = {}
    for name in sorted({name for adapter in adapters for name in adapter}):
        known = next(adapter[name] for adapter in adapters if name in adapter)
        a = torch.zeros(sum(ranks), known.a.shape[1])
        b = torch.zeros(known.b.shape[0], sum(ranks))
        start = 0
        for adapter, width in zip(adapters, ranks, strict=True):
            if name in adapter:
                factors = adapter[name]
                rows = slice(start, start + factors.a.shape[0])
                a[rows], b[:, rows] = factors.a, factors.b * factors.scaling
            start += width
        total[name] = Factors(a, b, 1.0)
    return total


def pattern(names: Iterable[str]) -> str:
    """A regular expression that matches exactly `names` in full (PEFT's `target_modules`, short and in a fixed order).

    Full paths, because leaf names such as `qkv` or `gate_proj` also occur in vision towers.
    """
    numbers: dict[tuple[str, str], list[int]] = defaultdict(list)
    plain = []
    for name in sorted(names):
        before, number, after = re.fullmatch(r"(.*?)(?:\.(\d+)\.(.*))?", name).groups()  # type: ignore[union-attr]
        if number is None:
            plain.append(re.escape(name))
        else:
            numbers[before, after].append(int(number))
    for (before, after), found in sorted(numbers.items()):
        layers = "|".join(map(str, sorted(found)))
        plain.append(rf"{re.escape(before)}\.(?:{layers})\.{re.escape(after)}")
    return "|".join(plain)


def save_adapter(folder: Path, adapter: Adapter, base: str, revision: str | None = None) -> None:
    """Write a folder that `PeftModel.from_pretrained(base, folder)` and vLLM load. Rank and scaling must be uniform."""
    scalings = {factors.scaling for factors in adapter.values()}
    if len(scalings) != 1 or len({factors.a.shape[0] for factors in adapter.values()}) != 1:
        raise ValueError("an adapter is saved with one rank and one scaling: concat() it first")
    alpha = scalings.pop() * rank(adapter)
    config = LoraConfig(
        r=rank(adapter),
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        target_modules=pattern(adapter),
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (a, b, _) in sorted(adapter.items()):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
