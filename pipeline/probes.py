"""General probes: tasks that are only ever evaluated, one small file each in `recipes/probes/`."""

from pathlib import Path

from mcit.data_prep.errors import InputError
from mcit.data_prep.hub import is_hub
from mcit.data_prep.schema import TaskConfig

from .layers import RECIPES, nearest
from .recipe_yaml import parse_yaml
from .tasks import place_tasks


def load_probe(name: str, data: str | None = None) -> TaskConfig:
    """The probe called `name`, its data at `data` (a folder or a place on the Hub) or where the file says.

    Raises `InputError`.
    """
    files = {file.stem: file for file in (RECIPES / "probes").glob("*.yaml")}
    if name not in files:
        raise InputError("no such probe", where=name, remedy=nearest(name, files))
    task = parse_yaml(files[name].read_text(encoding="utf-8"), str(files[name]))
    if data is not None:
        task["data"] = data if is_hub(data) else str(Path(data).resolve())
    place_tasks({"stream": [task]})
    return TaskConfig.model_validate(task, strict=True)
