"""From a recipe's files to a valid `Recipe`, before anything starts; and back to a file."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import atomic_open
from mcit.data_prep.schema import TaskConfig
from mcit.pipeline.policy.quantization import check_quantization
from mcit.pipeline.recipe.layers import Layers, leaves, nearest, read_layers
from mcit.pipeline.recipe.orders import members, resolve_orders
from mcit.pipeline.recipe.probes import resolve_general
from mcit.pipeline.recipe.refusals import refusal
from mcit.pipeline.recipe.schema import Recipe, Stage
from mcit.pipeline.recipe.text import to_yaml
from mcit.pipeline.run.redaction import shaped_secrets


def load_recipe(
    name: str | Path,
    overrides: Iterable[str] = (),
    with_methods: Iterable[str] = (),
    *,
    check_methods: bool = True,
) -> Recipe:
    """Load, merge and validate a recipe (a path, a packaged name such as `mini/sefe`, or a run directory).

    Modules beside the recipe and in the current folder become importable. `check_methods=False` leaves the methods as
    they are written, which spares their import: for recipes that were checked before.
    Raises `InputError` with the file and the dotted key of the first thing that is wrong.
    """
    layers = read_layers(name, overrides, with_methods)
    _check_secrets(layers)
    resolve_orders(layers)
    resolve_general(layers)
    try:
        recipe = Recipe.model_validate(layers.values, strict=True)
    except ValidationError as error:
        raise refusal(error, Recipe, layers) from None
    sys.path += [folder for folder in (recipe.folder, os.getcwd()) if folder not in sys.path]
    with _located(layers.origin(("recur",))):
        _ = recipe.entries
    _check_names(recipe, layers)
    with _located(layers.origin(("stream",))):
        stages = recipe.stages  # a task's overrides are checked here, not when its stage's turn comes
    if recipe.sweep:
        with _located(layers.origin(("sweep",))):
            stages += [stage for member in members(recipe) for stage in member.recipe.stages]
    with _located(layers.origin(("train", "attention"))):
        _check_attention(recipe, stages)
    if check_methods:
        with _located(layers.origin(("method",))):
            _settle_methods(recipe, stages)
    return recipe


def _settle_methods(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Check and write out the methods, in place; anchor samples that none of them asks for are left out."""
    keeps, carriers, stages = set[str](), set[str](), list(stages)
    if recipe.method:
        from mcit.pipeline.methods import build_methods, expand  # needs torch, sequential tuning does not

        recipe.method = expand(recipe.method)
        methods = [method for stage in stages for method in build_methods(recipe.method, stage.train)]
        keeps, carriers = {m.keeps for m in methods}, {m.name for m in methods if m.carries}
    check_quantization(recipe, {stage.train.lineage for stage in stages}, carriers)
    if "general data" not in keeps:
        recipe.anchors = []
    elif not recipe.anchors:
        raise InputError(
            "a method keeps general data, and the recipe names none",
            where="recipe",
            field="anchors",
            remedy="List data sets as in a stream: anchors: [{name: general, train: general.jsonl, images: pictures/}]",
        )


def _check_attention(recipe: Recipe, stages: Iterable[Stage]) -> None:
    """Raise `InputError` for what a stage would run into once its model is loaded, whatever machine it is on."""
    for train in (stage.train for stage in stages if (stage.train.attention or "").startswith("flash_attention")):
        problem = None
        if recipe.base_model.dtype == "float32":
            problem, remedy = "computes in 16 bits, and base_model.dtype is float32", "Set it to bfloat16"
        elif train.packing:
            problem, remedy = "cannot keep samples of a packed row apart", "Use flex_attention, or train.packing: false"
        if problem:
            raise InputError(f"{train.attention} {problem}", where="recipe", field="train.attention", remedy=remedy)


def _check_secrets(layers: Layers) -> None:
    """A recipe is copied into runs and logs. Raises `InputError`, without the secret, for one that holds any."""
    for keys, value in leaves(layers.values):
        for what, _ in shaped_secrets(str(value)):
            remedy = (
                "Secrets come from the environment (HF_TOKEN, …) or from `hf auth login`. If it was shared, revoke it"
            )
            raise InputError(f"holds {what}", where=layers.origin(keys), field=".".join(keys), remedy=remedy)


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain data, every default spelt out; loading it again gives the same recipe."""
    return recipe.model_dump(mode="json")


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, atomically."""
    with atomic_open(path) as file:
        file.write(to_yaml(dump_recipe(recipe)))


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the file's name before an `InputError` of someone who knows only the merged recipe."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).removeprefix("recipe: "), where=where) from None


def _check_names(recipe: Recipe, layers: Layers) -> None:
    """Every task is defined once, before its name is used, and trained at most once in a stage; what is not in the
    stream has other names."""
    where, defined = layers.origin(("stream",)), set[str]()
    for index, entry in enumerate(recipe.entries):
        names = [task if isinstance(task, str) else task.name for task in entry]
        for task, name in zip(entry, names, strict=True):
            if isinstance(task, str) and name not in defined:
                raise InputError(
                    f"no earlier task is called {name}",
                    where=where,
                    field=f"stream.{index}",
                    remedy=nearest(name, defined),
                )
            if isinstance(task, TaskConfig) and name in defined:
                raise InputError(
                    f"the task {name} is defined twice",
                    where=where,
                    field=f"stream.{index}",
                    remedy="Write only its name where it re-occurs",
                )
            if isinstance(task, TaskConfig) and task.train is None:
                raise InputError("is missing", where=where, field=f"stream.{name}.train")
            if names.count(name) > 1:
                raise InputError(f"{name} stands twice in one stage", where=where, field=f"stream.{index}")
            defined.add(name)
    for section, tasks in (("anchors", recipe.anchors), ("eval.general", recipe.eval.general)):
        for task in tasks:
            if task.name in defined:
                problem, keys = f"the name {task.name} is taken", section.split(".")
                raise InputError(problem, where=layers.origin(keys), field=f"{section}.{task.name}")
            defined.add(task.name)
