"""What a stage leaves: its policy in the form in which it is served, its increment, and the states of its methods."""

import contextlib
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from mcit.eval.engines.merging import write_merged
from mcit.eval.engines.settings import MAX_RANK
from mcit.eval.hashing import hash_model
from mcit.eval.lora import Adapter, Factors, hash_adapter

from ..policy.adapters import concat, live_adapter, rank, save_adapter
from ..policy.lineage import leave, save_whole

if TYPE_CHECKING:
    from .entering import Entered

States = Mapping[str, dict[str, torch.Tensor]]  # by method
Save = Callable[[States, Path], dict[str, Any]]  # writes into a folder; returns what its `serving.json` says of it


def what_to_save(entered: "Entered", last: bool) -> Save:
    """How the trained policy is written, by one process; all processes call this, and gather it.

    `last` is whether no phase of the stage follows.
    """
    train, tuned = entered.stage.train, entered.model
    if carrier := entered.carrier:
        return partial(_save_model, carrier.carried_as, partial(carrier.leave, tuned, entered.processor))
    if train.lineage == "full":
        write = partial(save_whole, tuned, entered.processor, entered.before.dtype, entered.loaded)
        return partial(_save_model, "merged", write)
    if last:
        return partial(_save_adapters, *leave(tuned, entered.previous, train), entered)
    return partial(_save_half, concat([live_adapter(tuned)]), entered)


def save_state(folder: Path, name: str, state: dict[str, torch.Tensor]) -> None:
    """Write a method's state, if it has one."""
    if state:
        file = _state_file(folder, name)
        file.parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous() for key, value in state.items()}, file)


def load_state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What `save_state` wrote; empty where it wrote nothing."""
    file = _state_file(folder, name)
    return load_file(file) if file.exists() else {}


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """A log row for JSON: a figure that is undefined (the mean over no answers, say) is null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def replace_folder(source: Path, target: Path) -> None:
    """Put `source` where `target` is. In between there is no `target`, never half of one."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    source.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _save_adapters(policy: Adapter, delta: Adapter, entered: "Entered", states: States, folder: Path) -> dict[str, Any]:
    """Write a LoRA policy and its increment, and what a method has evaluated in its place."""
    before = entered.before
    save_adapter(folder / "delta", delta, before.base, before.revision)
    found = (method.served(policy, states[method.name]) for method in entered.methods)
    served = next((changes for changes in found if changes is not None), None)
    if served is None:
        save_adapter(folder / "adapter", policy, before.base, before.revision)
        return _as_adapter(folder, policy)
    save_adapter(folder / "carried", policy, before.base, before.revision)
    if all(isinstance(change, Factors) or min(change.delta().shape) <= MAX_RANK for change in served.values()):
        thin = concat([{name: c if isinstance(c, Factors) else c.factors() for name, c in served.items()}])
        save_adapter(folder / "adapter", thin, before.base, before.revision)
        return _as_adapter(folder, thin) | {"carried": "carried"}
    write_merged(before, served, folder / "merged")
    return _as_model(folder, "merged") | {"carried": "carried"}


def _save_half(trained: Adapter, entered: "Entered", states: States, folder: Path) -> dict[str, Any]:
    """Write the LoRA that another phase trains on; it is not served."""
    save_adapter(folder / "adapter", trained, entered.before.base, entered.before.revision)
    return {"hash": hash_adapter(folder / "adapter")}


def _save_model(kind: str, write: Callable[[Path], None], states: States, folder: Path) -> dict[str, Any]:
    """Write a policy that is no LoRA."""
    write(folder / kind)
    return _as_model(folder, kind)


def _as_adapter(folder: Path, adapter: Adapter) -> dict[str, Any]:
    digest = hash_adapter(folder / "adapter")
    return {"kind": "adapter", "path": "adapter", "rank": rank(adapter), "hash": digest, "carried": None}


def _as_model(folder: Path, kind: str) -> dict[str, Any]:
    return {"kind": kind, "path": kind, "rank": None, "hash": hash_model(str(folder / kind)), "carried": None}


def _state_file(folder: Path, name: str) -> Path:
    return folder / "method" / f"{name}.safetensors"
