"""Datasets on the Hub as a place of data, `hub:owner/name[@revision]`: pinned to a commit, fetched in part."""

import re
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError

_PLACE = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_hub(data: str | None) -> bool:
    """Whether a place of data is on the Hub."""
    return data is not None and data.startswith("hub:")


def pin(data: str) -> str:
    """The place with the commit that it stands for now; it fetches the dataset's card alone. Raises `InputError`."""
    hub_id, revision = split_place(data)
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return data
    return f"hub:{hub_id}@{_snapshot(hub_id, revision, ['README.md']).name}"  # …/snapshots/<commit>


def same_dataset(data: str, other: str) -> bool:
    """Whether two places are one dataset, whatever their revisions."""
    return split_place(data)[0] == split_place(other)[0]


def is_pinned(data: str) -> bool:
    """Whether a place names a revision."""
    return split_place(data)[1] is not None


def download(data: str, paths: Iterable[str]) -> Path:
    """The local folder of a dataset with the files and folders `paths` (patterns too) in it. Raises `InputError`.

    What is there already is not fetched again; without a network, what was fetched before is what there is.
    """
    hub_id, revision = split_place(data)
    patterns = [pattern for path in paths for pattern in (["*"] if path == "." else [path, f"{path}/**"])]
    return _snapshot(hub_id, revision, patterns)


def split_place(data: str) -> tuple[str, str | None]:
    """The Hub's name and the revision, if there is one, of a place. Raises `InputError`."""
    match = _PLACE.fullmatch(data)
    if not match:
        remedy = "Write hub:owner/name or hub:owner/name@revision"
        raise InputError("is no dataset on the Hub", where=data, field="data", remedy=remedy)
    return match[1], match[2]


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # offline, gated, misspelt: the Hub client has an exception for each, none of them ours
        reason = str(error).split("\n", 1)[0]
        raise InputError(
            f"could not be had from the Hub ({reason})",
            where=f"hub:{hub_id}",
            field="data",
            remedy="Check the name and the network, log in with `hf auth login`, or give a local folder",
        ) from None
