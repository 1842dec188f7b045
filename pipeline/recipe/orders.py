"""A sweep: one recipe under several seeds and orders. What its runs are; `pipeline/run/sweep.py` runs them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import Config

from .layers import Layers, find_recipe, read_layer
from .tasks import inherited

if TYPE_CHECKING:
    from .schema import Recipe

Order = list[str | list[str]]  # names of tasks, as `stream:` may list them
OrderName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]  # part of a folder's name


class SweepConfig(Config):
    """`sweep:` of a recipe. Every order under every seed is a run of its own.

    A recipe file writes `order` as a list of recipes beside it (or packaged ones) whose `stream:` is an order of the
    same tasks, which is how published orders are kept; once read, it maps their names to the names of the tasks.
    """

    seed: list[int] = Field(default_factory=list)  # takes the place of the recipe's `seed`; empty: that one
    order: dict[OrderName, Order] = Field(default_factory=dict)  # empty: the stream's own

    @field_validator("seed")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise PydanticCustomError("sweep", "names a seed twice")
        return seeds


class Member(NamedTuple):
    """One run of a sweep."""

    name: str  # of its folder
    order: str | None
    seed: int
    recipe: "Recipe"


def resolve_orders(layers: Layers) -> None:
    """Replace `sweep.order: [a, b]` in the merged recipe by what the recipes a and b list, in place.

    Raises `InputError`.
    """
    sweep = layers.values.get("sweep")
    names = sweep.get("order") if isinstance(sweep, dict) else None
    if not isinstance(names, list):
        return
    where = layers.origin(("sweep", "order"))
    orders: dict[str, Order] = {}
    for name in names:
        if not isinstance(name, str):
            remedy = "Or give the orders themselves, as a mapping: {name: [task, task, …]}"
            raise InputError(f"{name!r} is no recipe", where=where, field="sweep.order", remedy=remedy)
        beside = Path(layers.values["folder"]) / f"{name}.yaml"
        path = beside if beside.is_file() else find_recipe(name)
        stream = read_layer(path).get("stream")
        if not isinstance(stream, list):
            remedy = "An order is a recipe with `stream: [task, task, …]`"
            raise InputError("lists no tasks", where=path, field="stream", remedy=remedy)
        if path.stem in orders:
            raise InputError(f"{path.stem} is named twice", where=where, field="sweep.order")
        orders[path.stem] = [_names(entry) for entry in stream]
    layers.set(("sweep", "order"), orders, where)


def members(recipe: "Recipe") -> Iterator[Member]:
    """The runs of a recipe with a `sweep`: under each order, each seed.

    Raises `InputError` for an order that is not one of the recipe's tasks.
    """
    assert recipe.sweep is not None
    known = {task.name for task in recipe.tasks}
    orders: list[tuple[str | None, Order | None]] = [*recipe.sweep.order.items()] or [(None, None)]
    for order, names in orders:
        for seed in recipe.sweep.seed or [recipe.seed]:
            name = f"seed-{seed}" if order is None else f"{order}-seed-{seed}"
            values = recipe.model_dump() | {"seed": seed, "sweep": None, "name": f"{recipe.name}-{name}"}
            if recipe.publish is not None:
                values["publish"]["repo_id"] += f"-{name}"
            if names is not None:
                _check(set(_flat(names)), known, f"sweep.order.{order}")
                values["stream"] = inherited(names, values["stream"])
            yield Member(name, order, seed, type(recipe).model_validate(values))


def _check(listed: set[str], known: set[str], field: str) -> None:
    for problem, names in (("no task is called", listed - known), ("leaves out", known - listed)):
        if names:
            raise InputError(f"{problem} {', '.join(sorted(names))}", field=field)


def _names(entry: Any) -> Any:
    """The names in an entry of a raw `stream:`."""
    if isinstance(entry, list):
        return [_names(inner) for inner in entry]
    return entry.get("name") if isinstance(entry, dict) else entry


def _flat(order: Order) -> Iterator[str]:
    for entry in order:
        yield from [entry] if isinstance(entry, str) else entry
