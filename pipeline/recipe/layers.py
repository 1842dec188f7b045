"""The text side of a recipe: files, `extends:`, `--with` and `key=value` merged into one mapping that knows origins."""

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mcit.recipes
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_text

from .tasks import inherited, place_tasks, resolve_paths, tasks_of
from .text import parse_yaml

RECIPES = Path(mcit.recipes.__file__).parent
COMMAND_LINE = "command line"

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function


@dataclass
class Layers:
    """The merged mapping, and which file (or the command line) wrote each key last."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[tuple[Any, ...], str] = field(default_factory=lambda: {(): "recipe"})

    def add(self, layer: dict[str, Any], origin: str) -> None:
        """Merge `layer` over what is there: mappings key by key, everything else replaces."""
        _merge(self.values, layer, origin, self.origins, ())

    def value(self, keys: Sequence[Any]) -> Any:
        """What stands at `keys`."""
        value: Any = self.values
        for key in keys:
            value = value[key]
        return value

    def set(self, keys: Sequence[Any], value: Any, origin: str) -> None:
        """Replace one key, whatever it held; `keys` may lead through lists by (existing) index."""
        target: Any = self.values
        for key in keys[:-1]:
            if isinstance(target, dict) and not isinstance(target.get(key), (dict, list)):
                target[key] = {}
            target = target[key]
        target[keys[-1]] = value
        _forget(self.origins, tuple(keys))
        self.origins[tuple(keys)] = origin

    def origin(self, keys: Sequence[Any]) -> str:
        """Who wrote `keys`: itself, something inside it, or its longest known prefix."""
        inside = [known for known in self.origins if known and known[: len(keys)] == tuple(keys)]
        prefixes = [tuple(keys[:end]) for end in range(len(keys), -1, -1)]
        return next(self.origins[known] for known in [*inside[-1:], *prefixes] if known in self.origins)


def read_layers(name: str | Path, overrides: Iterable[str] = (), with_methods: Iterable[str] = ()) -> Layers:
    """Read a recipe by path, packaged name (`mini/sefe`) or run directory, and lay everything over it in order.

    What a file extends comes first, then the file, each `--with` method, then the `key=value` overrides. Relative
    paths are resolved against the folder of the file that wrote them (overrides: the current folder); those of tasks in
    a file that has a `data:` key, or extends one that has, against what `data` is in the end.
    Raises `InputError`.
    """
    path = find_recipe(name)
    layers = Layers({"folder": str(path.parent.resolve())})
    layers.origins[()] = str(path)
    layer = _read_mapping(path)
    extends, parent = layer.pop("extends", None), {}
    if extends is not None:
        extended = _extended(path, extends)
        parent = _parent(path, extended)
        layers.add(parent, str(extended))
    resolve_paths(layer, path.resolve().parent, under_data="data" in parent)
    stream = layer.get("stream")
    if isinstance(stream, list):
        layer["stream"] = inherited(stream, parent.get("stream"))
    layers.add(layer, str(path))
    for method in with_methods:
        layer, origin = _method_layer(method)
        layers.add(layer, origin)
    _expand_stream(layers, path)
    for override in overrides:
        _override(layers, override)
        _expand_stream(layers, path)
    place_tasks(layers.values)
    place_tasks({"stream": layers.values.get("anchors")})
    return layers


def find_recipe(name: str | Path) -> Path:
    """The file a recipe argument means. Raises `InputError` with the packaged recipes when there is none."""
    path = Path(name)
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise InputError("is a folder without recipe.yaml", where=path, remedy="Name a recipe file or a run")
        return path / "recipe.yaml"
    if path.is_file():
        return path
    packaged = _packaged()
    if str(name) in packaged:
        return packaged[str(name)]
    if path.suffix in (".yaml", ".yml"):
        raise InputError("no such file", where=name, remedy="Name a recipe file, a packaged recipe, or a run's folder")
    raise InputError("no such recipe", where=name, remedy=_known(str(name), packaged, "Packaged recipes"))


def read_layer(path: Path) -> dict[str, Any]:
    """One YAML file as a mapping with absolute paths. Raises `InputError` that names line and column."""
    layer = _read_mapping(path)
    resolve_paths(layer, path.resolve().parent)
    return layer


def _read_mapping(path: Path) -> dict[str, Any]:
    layer = parse_yaml(read_text(path), str(path))
    if not isinstance(layer, dict):
        raise InputError("is not a mapping of keys", where=path, remedy="A recipe starts with `name: …`")
    return layer


def nearest(key: str, known: Iterable[str]) -> str:
    """A remedy that proposes the nearest known key, or lists them all."""
    return _known(key, known, "Known here")


def _known(key: str, known: Iterable[str], what: str) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"{what}: {', '.join(known)}" if known else ""


def _packaged() -> dict[str, Path]:
    """The recipes that ship with mcit, by name (not the method files and not the launchers' settings)."""
    files = (file for file in RECIPES.glob("*/*.yaml") if file.parent.name not in ("methods", "accelerate", "probes"))
    return {file.relative_to(RECIPES).with_suffix("").as_posix(): file for file in files}


def _extended(path: Path, extends: Any) -> Path:
    """The file that `extends:` means: one beside the recipe at `path`, or a packaged recipe."""
    if not isinstance(extends, str):
        raise InputError("must be the path of one recipe file", where=path, field="extends")
    if (path.parent / extends).is_file():
        return path.parent / extends
    if packaged := _packaged().get(extends):
        return packaged
    remedy = "It is relative to this file, or a packaged recipe (`mini/stream`)"
    raise InputError(f"no such file: {extends}", where=path, field="extends", remedy=remedy)


def _parent(path: Path, extended: Path) -> dict[str, Any]:
    parent = read_layer(extended)
    if "extends" in parent:
        raise InputError(
            f"{extended.name} extends another file itself", where=path, field="extends", remedy="One level is allowed"
        )
    return parent


def _method_layer(method: str) -> tuple[dict[str, Any], str]:
    """What `--with METHOD` adds: recipes/methods/<name>.yaml, a file, or a module:Class with its defaults."""
    if _REFERENCE.fullmatch(method):
        return {"method": {method: {}}}, COMMAND_LINE
    path = RECIPES / "methods" / f"{method}.yaml"
    if not path.is_file():
        path = Path(method)
    if not path.is_file():
        names = [file.stem for file in (RECIPES / "methods").glob("*.yaml")]
        raise InputError("no such method", where=f"--with {method}", remedy=_known(method, names, "Methods"))
    layer = read_layer(path)
    if "extends" in layer:
        raise InputError("a method file cannot extend another", where=path, field="extends")
    return layer, str(path)


def _expand_stream(layers: Layers, path: Path) -> None:
    """`stream: mini` stands for the stream of recipes/mini/stream.yaml."""
    name = layers.values.get("stream")
    if not isinstance(name, str):
        return
    file = RECIPES / name / "stream.yaml"
    if not file.is_file():
        names = [found.parent.name for found in RECIPES.glob("*/stream.yaml")]
        raise InputError(
            f"no such stream: {name}",
            where=layers.origin(("stream",)),
            field="stream",
            remedy=_known(name, names, "Streams"),
        )
    layer = read_layer(file)
    layers.values["stream"] = layer.get("stream")
    layers.origins[("stream",)] = str(file)
    if "data" in layer:
        layers.values.setdefault("data", layer["data"])


def _override(layers: Layers, override: str) -> None:
    """Lay one `dotted.key=value` over the rest. A list is entered by index, the stream also by task name."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError("is not of the form key=value", where=COMMAND_LINE, field=override)
    keys = _place(layers, key)
    fragment: Any = parse_yaml(text, f"{COMMAND_LINE}: {key}")
    for part in reversed(keys):  # a layer of its own, so that paths in it are resolved like a file's
        fragment = [fragment] if isinstance(part, int) else {part: fragment}
    resolve_paths(fragment, Path.cwd())
    for part in keys:
        fragment = fragment[0 if isinstance(part, int) else part]
    if keys == ["stream"] and isinstance(fragment, list):
        fragment = inherited(fragment, layers.values.get("stream"))
    layers.set(keys, fragment, COMMAND_LINE)


def _place(layers: Layers, key: str) -> list[Any]:
    """`stream.digits.train` → ["stream", 0, "train"]: where a dotted key leads in the merged mapping."""
    keys: list[Any] = []
    here: Any = layers.values
    place: list[Any] | None
    for part in key.split("."):
        if isinstance(here, list):
            place = _task_place(here, part) if keys[0] == "stream" else None
            if place is None and part.isdigit() and int(part) < len(here):
                place = [int(part)]
            if place is None:
                names = [task["name"] for task in tasks_of(here) if "name" in task] if keys[0] == "stream" else []
                remedy = nearest(part, names) if names else f"The list has {len(here)} entries, counted from 0"
                raise InputError(f"no such entry: {part}", where=COMMAND_LINE, field=key, remedy=remedy)
            for index in place:
                here = here[index]
        else:
            place = [part]
            here = here.get(part) if isinstance(here, dict) else None
        keys += place
    return keys


def _task_place(stream: list[Any], name: str) -> list[int] | None:
    """The index path of the task called `name`, through mixed stages."""
    for index, entry in enumerate(stream):
        if isinstance(entry, dict) and entry.get("name") == name:
            return [index]
        if isinstance(entry, list) and (inner := _task_place(entry, name)) is not None:
            return [index, *inner]
    return None


def _merge(
    into: dict[str, Any], layer: dict[str, Any], origin: str, origins: dict[tuple[Any, ...], str], at: tuple[Any, ...]
) -> None:
    for key, value in layer.items():
        here = (*at, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin, origins, here)
        else:
            into[key] = copy.deepcopy(value)
            _forget(origins, here)
            origins[here] = origin


def _forget(origins: dict[tuple[Any, ...], str], keys: tuple[Any, ...]) -> None:
    for known in [known for known in origins if known[: len(keys)] == keys]:
        del origins[known]


def leaves(mapping: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The dotted keys of a nested mapping with their values."""
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value
