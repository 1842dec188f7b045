"""Recipes as text: a YAML that reads what people mean, and writes what it reads back."""

import re
from typing import Any

import yaml

from mcit.data_prep.errors import InputError


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.2's core types (`2e-4` is a number; `no`, `1:30` and dates are text); a key given twice is refused."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's name)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a list or mapping is no key: put quotes around what stands in braces or brackets"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),  # PyYAML would read 010 as octal
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


class _RecipeDumper(yaml.SafeDumper):
    """Quotes exactly what `RecipeLoader` would not read back as text."""

    yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers


def to_yaml(value: Any) -> str:
    """Plain data as YAML text that `RecipeLoader` reads back the same, keys in their own order."""
    return yaml.dump(value, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True, width=119)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text. Raises `InputError`."""
    try:
        return yaml.load(text, RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise InputError(f"malformed YAML: {error.problem}", where=place) from None
    except yaml.YAMLError as error:
        raise InputError(f"malformed YAML: {error}", where=where) from None
