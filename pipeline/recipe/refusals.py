"""What a recipe's schema refuses, as one line that a user can act on."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Config

from .layers import Layers, nearest


def refusal(error: ValidationError, model: type[Config], layers: Layers) -> InputError:
    """The first error of a section as one line: who wrote the key, the key, what is wrong, the nearest known key."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")  # a typo explains what is missing
    keys = [key for key in first["loc"] if not str(key).startswith("<")]
    known = _known_keys(model, first["loc"])
    where, dotted = layers.origin(keys), _dotted(keys, layers.values)
    if first["type"] == "extra_forbidden":
        return InputError("unknown key", where=where, field=dotted, remedy=nearest(str(keys[-1]), known))
    if first["type"] == "missing":
        return InputError("is missing", where=where, field=dotted)
    shown = "" if isinstance(first["input"], (dict, list)) else f", not {first['input']!r}"
    return InputError(f"{first['msg']}{shown}", where=where, field=dotted)


def _known_keys(model: type[Config], loc: tuple[Any, ...]) -> list[str]:
    """The keys that would be right beside the last one of `loc`."""
    for key in loc[:-1]:
        if isinstance(key, str) and key in model.model_fields:
            model = next(_sections(model.model_fields[key].annotation), model)
    return list(model.model_fields)


def _sections(annotation: Any) -> Iterator[type[Config]]:
    """The recipe sections inside a type, e.g. TaskConfig in list[TaskConfig | str]."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _dotted(keys: list[Any], values: Any) -> str:
    """`("stream", 0, "train")` → `stream.digits.train`, with a task's name for its place where it has one."""
    parts = []
    for key in keys:
        with contextlib.suppress(LookupError, TypeError):
            values = values[key]
        named = isinstance(key, int) and isinstance(values, dict) and isinstance(values.get("name"), str)
        parts.append(values["name"] if named else str(key))
    return ".".join(parts)
