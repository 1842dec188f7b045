"""LoRA as plain factors: read from a PEFT folder, and added to the weights of a model."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # what PEFT puts before the base model's module names


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
Changes = Mapping[str, Factors | Dense]  # of the base's weights, by module name


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
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.weight", key)
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


@torch.no_grad()
def fold(model: nn.Module, changes: Changes) -> None:
    """Add changes to the weights of `model`: summed in float32, rounded to the weights' own dtype once.

    Raises `InputError` for a change that does not fit the model.
    """
    for name, change in changes.items():
        weight, delta = linear_layer(model, name).weight, change.delta()
        if delta.shape != weight.shape:
            problem = f"does not fit the base model: it is {list(delta.shape)}, and the layer {list(weight.shape)}"
            raise InputError(problem, where=name)
        weight.copy_((weight.float() + delta.to(weight.device)).to(weight.dtype))


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """The layer that an adapter has factors for. Raises `InputError` if the model has none of this name."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise InputError("does not fit the base model: it has no such linear layer", where=name)
    return module


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                yield key, file.get_tensor(key)
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except SafetensorError as error:
        remedy = "Fetch it again; of a run, remove the stage's folder, and it is trained again"
        raise InputError(f"is not a safetensors file: {error}", where=path, remedy=remedy) from None


def _own(patterns: dict[str, float], name: str, default: float) -> float:
    """PEFT's rule for `alpha_pattern`: a key stands for a module whose path ends with it."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)
