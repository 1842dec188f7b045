"""LoRA adapters as plain factors: read a PEFT folder, add policies up, write a PEFT folder again."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json

from ..training.zero3 import gather

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # what PEFT puts before the base model's module names


class Factors(NamedTuple):
    """What LoRA adds to one linear layer: `scaling * b @ a`."""

    a: Tensor  # [r, in], float32
    b: Tensor  # [out, r], float32
    scaling: float

    def delta(self) -> Tensor:
        """The change of the layer's weight, [out, in]."""
        return self.scaling * self.b @ self.a


class Dense(NamedTuple):
    """A change of one linear layer's weight that is no product of thin factors."""

    change: Tensor  # [out, in], float32

    def delta(self) -> Tensor:
        """As that of `Factors`."""
        return self.change

    def factors(self) -> Factors:
        """The change itself and an identity: of rank min(out, in)."""
        rows, columns = self.change.shape
        if rows <= columns:
            return Factors(self.change, torch.eye(rows), 1.0)
        return Factors(torch.eye(columns), self.change, 1.0)


Adapter = dict[str, Factors]  # by module name of the base model


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
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter folder. Raises `InputError` where it holds more than plain LoRA factors of linear layers."""
    config = read_json(folder / CONFIG)
    unsupported = [key for key in ("use_dora", "lora_bias", "modules_to_save", "target_parameters") if config.get(key)]
    if config.get("peft_type") != "LORA" or unsupported:
        raise InputError(
            "is not a plain LoRA adapter",
            where=folder / CONFIG,
            field=", ".join(unsupported) or "peft_type",
            remedy="Merge it into the model and start from that",
        )
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in _tensors(folder / WEIGHTS):
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.*)\.lora_([AB])\.weight", key)
        if match is None or tensor.ndim != 2:
            raise InputError("is not a LoRA factor of a linear layer", where=folder / WEIGHTS, field=key)
        factors[match[1]][match[2]] = tensor.float()
    adapter = {}
    for name, pair in sorted(factors.items()):
        if len(pair) != 2:
            raise InputError("has only one of its two factors", where=folder / WEIGHTS, field=name)
        r = pair["A"].shape[0]
        alpha = _own(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
        adapter[name] = Factors(pair["A"], pair["B"], alpha / (r**0.5 if config.get("use_rslora") else r))
    return adapter


def hash_adapter(folder: Path) -> str:
    """SHA-256 of what an adapter adds: its tensors and what scales them (not where its base lay)."""
    config = read_json(folder / CONFIG)
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
    digest = hashlib.sha256(json.dumps([config.get(key) for key in keys], sort_keys=True).encode())
    with open(folder / WEIGHTS, "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except SafetensorError as error:
        raise InputError(f"is not a safetensors file: {error}", where=path) from None


def _own(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's rule for `alpha_pattern`: a key stands for a module whose path ends with it."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)
