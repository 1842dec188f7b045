"""What must not leave the machine: secrets, local paths, names of data. Looked for in every file before any is sent."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.hub import is_hub
from mcit.data_prep.places import PATHS
from mcit.data_prep.readers import is_function
from mcit.eval.hashing import cache_dir

from ..recipe.schema import Recipe
from ..run.doctor import hub_cache
from ..run.redaction import secrets_in
from .config import PublishConfig

Content = Path | bytes
Tree = Mapping[str, Content]  # path in the repository → what it holds
WITHHELD = "(not published)"
# Weights as safetensors, and text: no pickle, no archive, no optimizer's or trainer's state has one of these endings.
_SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".md", ".yaml", ".png")
_USUAL = re.compile(r"(train|test|val|validation|dev|data|samples?|questions?|answers?|annotations?|images?)\.\w+")


class Private:
    """What is known of a run that nobody else is to know."""

    def __init__(self, recipe: Recipe, run_dir: Path, config: PublishConfig):
        places = [str(place) for place in _places(recipe, run_dir) if len(place.parts) > 1]  # `/` is everywhere
        self._places = dict.fromkeys(places, "a path of this machine")
        told = {f"hub:{hub_id}" for hub_id in config.datasets.values()}
        for name in _data_names(recipe, told):
            self._places.setdefault(name, "the name of private data")
        # `/root` alone is a word of many vocabularies: of the home folder, only what lies in it tells something.
        ends = {str(Path.home()): "(?=/.)"}
        known = sorted(self._places, key=len, reverse=True)
        every = (r"(?<![\w.-])" + re.escape(place) + ends.get(place, r"(?![\w-])") for place in known)
        self._pattern = re.compile("|".join(every))

    def found(self, text: str) -> Iterator[tuple[str, int]]:
        """(what it is, where it starts) of everything in `text` that must not be told. Never the thing itself."""
        yield from secrets_in(text)
        for match in self._pattern.finditer(text):
            yield self._places[match[0]], match.start()

    def without(self, value: Any) -> Any:
        """Plain data in which each text that holds something private, or is an address or a path, is withheld."""
        if isinstance(value, Mapping):
            return {key: self.without(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.without(inner) for inner in value]
        if isinstance(value, str) and ("://" in value or os.path.isabs(value) or any(self.found(value))):
            return WITHHELD
        return value

    def check(self, tree: Tree) -> None:
        """Raises `InputError` for the first file of a tree that must not be published, or holds what must not."""
        for name, content in tree.items():
            where = content if isinstance(content, Path) else name
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.endswith(_SUFFIXES):
                remedy = "Weights are published as safetensors, everything else as text"
                raise InputError("is of a kind that is not published", where=where, remedy=remedy)
            if isinstance(content, Path) and (content.is_symlink() or not content.is_file()):
                raise InputError("is no file of its own but a link, and what it leads to is not published", where=where)
            text = _text(content)
            for what, start in self.found(text):
                line = text.count("\n", 0, start) + 1
                remedy = f"Nothing was published. Look at what would be: --dry-run DIR ({name})"
                raise InputError(f"holds {what}, in line {line}", where=where, remedy=remedy)


def _text(content: Content) -> str:
    """What can be read of a file: of safetensors the header, since numbers tell nothing."""
    if isinstance(content, bytes):
        return content.decode(errors="replace")
    if content.suffix != ".safetensors":
        return content.read_bytes().decode(errors="replace")
    with open(content, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= 100_000_000 else b""  # the format's own limit
    try:
        return json.dumps(json.loads(header), ensure_ascii=False)
    except ValueError:
        raise InputError("is not a safetensors file", where=content, remedy="Nothing was published") from None


def _places(recipe: Recipe, run_dir: Path) -> Iterator[Path]:
    """Paths of this machine that could have got into a file."""
    yield from (Path.home(), Path.cwd(), run_dir.resolve(), Path(recipe.folder), cache_dir(), hub_cache())
    if os.path.isabs(recipe.base_model.path):
        yield Path(recipe.base_model.path)
    for path in _data_paths(recipe):
        if path.is_absolute():
            yield path


def _data_paths(recipe: Recipe) -> Iterator[Path]:
    places: Iterable[Any] = (getattr(task, key) for task in recipe.sources for key in PATHS)
    for place in (recipe.data, *places):
        if isinstance(place, str) and not is_hub(place) and not is_function(place):
            yield Path(place)


def _data_names(recipe: Recipe, told: set[str]) -> Iterator[str]:
    """Names of data files and datasets; names that every data set uses say nothing."""
    for place in (recipe.data, *(task.data for task in recipe.sources)):
        if place is not None and is_hub(place) and (dataset := place.partition("@")[0]) not in told:
            yield dataset.removeprefix("hub:")
    for path in _data_paths(recipe):
        if path.suffix and not _USUAL.fullmatch(path.name):
            yield path.name
        if len(path.parts) > 2:
            yield "/".join(path.parts[-2:])
