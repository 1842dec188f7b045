"""The identity of a model: a hash over the files that decide its answers."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open, hash_json

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


def cache_dir() -> Path:
    """Where content-addressed data live: `$MCIT_CACHE`, or `~/.cache/mcit`."""
    return Path(os.environ.get("MCIT_CACHE") or Path.home() / ".cache" / "mcit")


def model_folder(path_or_id: str, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or a Hub id's snapshot (downloaded if it is not there yet).

    Raises `InputError` if there is neither.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if Path(path_or_id).is_absolute() or path_or_id.startswith("."):
        raise InputError("no such model folder", where=path_or_id)
    from huggingface_hub import snapshot_download

    with _from_hub(path_or_id):
        patterns = [f"*{suffix}" for suffix in _SUFFIXES]
        return Path(snapshot_download(path_or_id, revision=revision, allow_patterns=patterns))


def hub_commit(hub_id: str, revision: str | None = None) -> str:
    """The commit that a Hub id stands for; fetches `config.json` alone. Raises `InputError`."""
    if Path(hub_id).is_absolute() or hub_id.startswith("."):
        raise InputError("no such model folder", where=hub_id)
    from huggingface_hub import hf_hub_download

    with _from_hub(hub_id):
        return Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent.name  # …/snapshots/<commit>/


@contextlib.contextmanager
def _from_hub(hub_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # offline, gated, misspelt: the Hub client has an exception for each, none of them ours
        reason = str(error).split("\n", 1)[0]
        raise InputError(
            f"neither a folder nor a model that could be had from the Hub ({reason})",
            where=hub_id,
            field="base_model.path",
            remedy="Check the name, log in with `hf auth login`, or give a local folder",
        ) from None


def hash_model(path_or_id: str, revision: str | None = None) -> str:
    """SHA-256 (hex) over names and contents of a model's weight, configuration, tokenizer and template files.

    What is not read when the model is loaded (README, images, training state, other formats of the weights) does not
    count. The digest of each file is remembered by path, size and time, since weights are many gigabytes.
    Raises `InputError` where there is no such model, or none in safetensors.
    """
    folder = model_folder(path_or_id, revision)
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name.endswith(_SUFFIXES)]
    if not any(file.name == "config.json" for file in files):
        raise InputError("holds no config.json", where=folder, remedy="Give the folder of a saved model")
    if not any(file.suffix == ".safetensors" for file in files):
        remedy = "Pickles are never read: load the model where you trust it, and `save_pretrained` it anew"
        raise InputError("holds no weights in safetensors", where=folder, remedy=remedy)
    return hash_json([[file.name, _digest(file)] for file in files])


def _digest(file: Path) -> str:
    """SHA-256 of a file's content. A small file is read each time, a large one once."""
    stat = file.stat()
    if stat.st_size < 1 << 20:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    key = hash_json([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    memo = cache_dir() / "hashes" / key
    if memo.exists():
        return memo.read_text(encoding="ascii")
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with atomic_open(memo) as out:
        out.write(digest)
    return digest
