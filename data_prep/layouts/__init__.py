"""Published layouts: what turns one raw row of a benchmark's files into a row that `rows.py` reads.

One short file a layout, with `row(raw, part)`, which returns a row (`prompt`, `completion`, `images`, `references`, …)
or `None` for a row that is not of that part. Where a file is one JSON object instead of a list, `rows(document)` in the
same file yields its raw rows. CONTRIBUTING.md says how to add one; `layout: my_module:my_row` needs no change here.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..readers import Part, is_function, load_function

Row = dict[str, Any]


class Layout(NamedTuple):
    """How the raw rows of a source become rows, and what holds the raw rows of a file that is one JSON object."""

    name: str
    row: Callable[[Any, Part], Row | None]
    rows: Callable[[Any], Iterable[Any]] | None

    def read(self, raw: Any, part: Part, where: str) -> Row | None:
        """`row`, with what can go wrong in it as an `InputError`."""
        try:
            return self.row(raw, part)
        except InputError:
            raise
        except KeyError as error:
            problem = f"has no field {error}, so it is not of the layout {self.name}"
            raise InputError(problem, where=where, remedy="Look at the file, and at `layout:` of the task") from None
        except Exception as error:  # a row of another layout, or a user's own function, can fail in any way
            problem = f"the layout {self.name} cannot read this row: {type(error).__name__}: {error}"
            raise InputError(problem, where=where) from None


def load_layout(name: str | None, base_dir: Path) -> Layout:
    """The layout called `name`, or made of `module:function`; `None`: rows as they are. Raises `InputError`."""
    if name is None:
        return Layout("", lambda raw, part: raw, None)
    if is_function(name):
        function = load_function(name, base_dir)
        module: Any = sys.modules[name.partition(":")[0]]
    else:
        if name not in (known := layout_names()):
            raise InputError(f"unknown layout {name!r}", remedy=f"Known: {', '.join(known)}; or module:function")
        module = importlib.import_module(f"{__name__}.{name}")
        function = module.row
    return Layout(name, function, getattr(module, "rows", None))


def layout_names() -> list[str]:
    """The layouts that ship with mcit."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
