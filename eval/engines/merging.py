"""An adapter of a higher rank than vLLM serves, merged into a copy of the base for as long as it is served."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit.data_prep.files import hash_json

from .base import Policy
from .transformers import load_lora


@contextlib.contextmanager
def merged_copy(policy: Policy, cache: Path) -> Iterator[Path]:
    """A folder with the base's weights and the adapter merged in, in the serving dtype; gone when the block is left.

    It lies in `cache/merged/`, under a name made from base, adapter and dtype: what a killed evaluation left there is
    used by the next one, and removed after it. Whoever uses it holds a shared lock. Raises `InputError` for an adapter
    that does not fit the base.
    """
    serving = policy.serving
    folder = cache / "merged" / hash_json([serving.base_hash, serving.hash, serving.dtype])[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        while not folder.exists():  # another evaluation can remove it while this one changes its lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _make(policy, folder)
            fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            yield folder
        finally:
            with contextlib.suppress(BlockingIOError):  # another evaluation still serves it, and removes it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _make(policy: Policy, folder: Path) -> None:
    """Write the copy, whole or not at all."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        _merge(policy, temporary)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def _merge(policy: Policy, folder: Path) -> None:
    """`W + scaling · B A` in float32 from the untouched weights, rounded to the serving dtype once."""
    serving = policy.serving
    source = {"revision": serving.revision, "trust_remote_code": serving.trust_remote_code}
    # As stored, since a float32 copy of everything may not fit; only one layer at a time is in float32.
    model = AutoModelForImageTextToText.from_pretrained(serving.base, dtype="auto", use_safetensors=True, **source)
    dtype, adapted = getattr(torch, serving.dtype), load_lora(model, policy)
    layers: list[Any] = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        weight.data = (weight.float() + layer.get_delta_weight(serving.hash)).to(dtype)
    adapted.unload().to(dtype).save_pretrained(folder)
    AutoProcessor.from_pretrained(serving.base, **source).save_pretrained(folder)
