"""A policy as one model: merged into the base for good, or, where vLLM takes no LoRA of its rank, while it is served.

    W' = round(round(W) + scaling · B A)

W is rounded to the dtype that policies are trained and served in; the sum is made in float32, and rounded to that dtype
once. For that is the policy which was trained, and which an engine serves with its LoRA beside the base: both load the
base in that dtype, whatever it is stored in, and add the LoRA to it. The factors are those of the file: PEFT's own
merge would round them to the base's dtype first.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mcit.data_prep.files import hash_json

from ..hashing import model_folder
from ..lora import Changes, fold, load_adapter
from ..serving import Serving, save_processor
from .base import Policy


def write_merged(serving: Serving, changes: Changes, folder: Path) -> None:
    """Write the base of `serving` with `changes` merged in to `folder`, as a model in the layout of the base's files.

    Raises `InputError` for changes that do not fit the base.
    """
    source = {"revision": serving.revision, "trust_remote_code": serving.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(
        serving.base, dtype=getattr(torch, serving.dtype), use_safetensors=True, **source
    )
    fold(model, changes)
    model.save_pretrained(folder)
    save_processor(AutoProcessor.from_pretrained(serving.base, **source, **serving.processor), folder)
    _lay_out_as(model_folder(serving.base, serving.revision), folder)


def _lay_out_as(base: Path, folder: Path) -> None:
    """Take from the base's own files what no merge has changed: all that is no matrix.

    transformers keeps the tensor names that a model was loaded under, but writes a mixture's experts transposed.
    """
    where: dict[str, Path] = {}
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            where |= {name: file for name in opened.keys() if len(opened.get_slice(name).get_shape()) != 2}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & where.keys():
            with safe_open(where[name], framework="pt") as opened:
                tensors[name] = opened.get_tensor(name).to(tensors[name].dtype)
        whole = file.with_suffix(".whole")  # what was loaded is read from the file as it is needed
        save_file(tensors, whole, metadata={"format": "pt"})
        whole.replace(file)


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
        assert policy.adapter is not None
        write_merged(policy.serving, load_adapter(policy.adapter), temporary)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
