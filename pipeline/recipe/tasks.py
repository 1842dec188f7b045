"""The tasks in a raw `stream:`: where their paths lead, and how a stream takes over those of another."""

import copy
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mcit.data_prep.hub import is_hub
from mcit.data_prep.places import PATHS
from mcit.data_prep.readers import is_function

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_paths(layer: dict[str, Any], folder: Path, *, under_data: bool = False) -> None:
    """Make the paths in a layer absolute, in place: the base model's folder, `data`, and the data files of all tasks.

    What is relative to `data` stays so: the paths of a task that has its own, and of all where the layer has a `data`
    key (even an empty one, to be given later) or comes `under_data`.
    """
    base = layer.get("base_model")
    if isinstance(base, dict) and isinstance(base.get("path"), str):
        local = folder / Path(base["path"]).expanduser()
        if local.exists() or not _HUB_ID.fullmatch(base["path"]) or base["path"].startswith("."):
            base["path"] = str(local.resolve())
    under_data = under_data or "data" in layer
    _make_absolute(layer, ["data", "start_from"], folder)
    stream = () if under_data else tasks_of(layer.get("stream"))
    section = layer.get("eval")
    general = section.get("general") if isinstance(section, dict) else None
    for task in (*stream, *tasks_of(layer.get("anchors")), *tasks_of(general)):
        _make_absolute(task, ["data"] if "data" in task else PATHS, folder)


def place_tasks(values: dict[str, Any]) -> None:
    """Put `data` before the relative paths of the tasks, in place; a task's own is relative to the recipe's.

    A task whose data are on the Hub keeps relative paths and names the dataset in its `data`.
    """
    top = values.get("data") if isinstance(values.get("data"), str) else None
    for task in tasks_of(values.get("stream")):
        own, prefix = task.get("data"), ""
        root: str | None = own if isinstance(own, str) else top
        if isinstance(own, str) and _is_relative(own):
            root, prefix = top, own
        if root is None:
            continue  # still to be given
        for key in PATHS:
            if _is_relative(task.get(key)):
                path = os.path.normpath(os.path.join(prefix, task[key]))
                task[key] = path if is_hub(root) else os.path.abspath(os.path.join(root, path))
        if is_hub(root):
            task["data"] = root
        else:
            task.pop("data", None)


def _make_absolute(mapping: dict[str, Any], keys: Iterable[str], folder: Path) -> None:
    for key in keys:
        if _is_relative(mapping.get(key)):
            # Not resolve(): image paths in the data are compared with `images` as they are written.
            mapping[key] = os.path.abspath(folder / Path(mapping[key]).expanduser())


def _is_relative(value: Any) -> bool:
    """Whether a value is a path that is not absolute yet: no place on the Hub and no function."""
    return isinstance(value, str) and not (is_hub(value) or is_function(value) or os.path.isabs(value))


def inherited(stream: list[Any], parent: Any) -> list[Any]:
    """A stream in which the tasks of the extended file may be named, and changed key by key.

    `[b, a, {name: c, test: 0.2}]` over tasks a, b, c is another order of them with another test set for c. A name that
    was used before stays a name: the task re-occurs.
    """
    known = {task["name"]: task for task in tasks_of(parent) if isinstance(task.get("name"), str)}
    used = set[str]()

    def one(entry: Any) -> Any:
        if isinstance(entry, list):
            return [one(inner) for inner in entry]
        name = str(entry.get("name") if isinstance(entry, dict) else entry)
        if name not in known or name in used:
            return entry
        used.add(name)
        return copy.deepcopy(known[name]) | (entry if isinstance(entry, dict) else {})

    return [one(entry) for entry in stream]


def tasks_of(stream: Any) -> Iterable[dict[str, Any]]:
    """The task mappings in a raw `stream:`, those inside mixed stages too."""
    for entry in stream if isinstance(stream, list) else ():
        if isinstance(entry, dict):
            yield entry
        else:
            yield from tasks_of(entry)
