"""General probes: tasks that are only ever evaluated, one small file each in `recipes/probes/`."""

from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.hub import is_hub
from mcit.data_prep.schema import TaskConfig

from .layers import RECIPES, Layers, nearest
from .tasks import place_tasks
from .text import parse_yaml


def load_probe(name: str, data: str | None = None) -> TaskConfig:
    """The probe called `name`, its data at `data` (a folder or a place on the Hub) or where the file says.

    Raises `InputError`.
    """
    task = _read_probe(name, name)
    if data is not None:
        task["data"] = data if is_hub(data) else str(Path(data).resolve())
    place_tasks({"stream": [task]})
    return TaskConfig.model_validate(task, strict=True)


def resolve_general(layers: Layers) -> None:
    """Put the tasks that `eval.general` of the merged recipe names in the names' place.

    `pope` is the packaged probe; `{name: pope, data: /data/POPE}` is the same with other keys; a mapping of another
    name is a task of its own. Raises `InputError` for an unknown name.
    """
    section = layers.values.get("eval")
    entries = section.get("general") if isinstance(section, dict) else None
    if not isinstance(entries, list):
        return  # nothing, or for the schema to refuse
    where = layers.origin(("eval", "general"))
    tasks = [_resolved(entry, where) for entry in entries]
    place_tasks({"stream": tasks})
    layers.set(("eval", "general"), tasks, where)


def _resolved(entry: Any, where: str) -> Any:
    if isinstance(entry, str):
        return _read_probe(entry, where, "eval.general")
    if isinstance(entry, dict) and entry.get("name") in _probes():
        return _read_probe(entry["name"], where) | entry
    return entry


def _read_probe(name: str, where: str, field: str = "") -> dict[str, Any]:
    files = _probes()
    if name not in files:
        problem = f"no such probe: {name}" if field else "no such probe"
        raise InputError(problem, where=where, field=field, remedy=nearest(name, files))
    return dict(parse_yaml(files[name].read_text(encoding="utf-8"), str(files[name])))


def _probes() -> dict[str, Path]:
    return {file.stem: file for file in (RECIPES / "probes").glob("*.yaml")}
