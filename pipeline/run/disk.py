"""How much disk a stage needs, and whether there is as much, before anything is trained."""

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcit.data_prep.errors import InputError

from ..stage.checkpoints import KEPT

if TYPE_CHECKING:
    from ..methods import Method
    from ..recipe.schema import Recipe, Stage

Shapes = Mapping[str, tuple[int, int]]  # of the layers with LoRA: [out, in], by name
# Of a parameter in training, in a checkpoint: it, its float32 copy and Adam's two moments. Other optimizers need less.
_CHECKPOINT_BYTES = 16


@dataclass(frozen=True)
class Needs:
    """Bytes of one stage."""

    kept: int  # adapter and increment, or a merged model, and the methods' state
    work: int  # checkpoints, while it trains

    def __str__(self) -> str:
        return f"{size(self.kept)} to keep, {size(self.work)} for checkpoints"


def stage_needs(stage: "Stage", model: Any, shapes: Shapes, entering_rank: int, methods: Iterable["Method"]) -> Needs:
    """The needs of a stage that puts LoRA on layers of these `shapes`, trains all weights, or has a method carry them.

    Of `model`, the base, only shapes are looked at. Adapters are written in float32, the policy with all its ranks
    (`pipeline/policy/adapters.py`).
    """
    methods = list(methods)
    state = sum(method.disk(model, shapes, stage) for method in methods)
    if any(method.carries for method in methods):
        parameters = list(model.parameters())
        base = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        stages = stage.k if stage.train.lineage == "stack" else 1
        trained = state // stages // parameters[0].element_size()
        return Needs(base + 2 * state, (KEPT + 1) * _CHECKPOINT_BYTES * trained)
    if stage.train.lineage == "full":
        parameters = list(model.parameters())
        base = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return Needs(base + state, (KEPT + 1) * _CHECKPOINT_BYTES * sum(parameter.numel() for parameter in parameters))
    width, r = sum(rows + columns for rows, columns in shapes.values()), stage.train.lora.r
    ranks = {"independent": 2 * r, "continue": r + 2 * r}.get(stage.train.lineage, entering_rank + 2 * r)
    return Needs(4 * width * ranks + state, (KEPT + 1) * _CHECKPOINT_BYTES * width * r)


def check_run(folder: Path, recipe: "Recipe", config: Any, done: Collection[int]) -> None:
    """Refuse a run whose stages, but for those that are `done`, the disk does not hold. Raises `InputError`.

    `config` is the base model's.
    """
    import torch  # here: takes seconds
    from transformers import AutoModelForImageTextToText

    base = recipe.base_model
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code
        )
    check_disk(folder, run_needs(recipe, model, done), "the run")


def run_needs(recipe: "Recipe", model: Any, done: Collection[int] = ()) -> Needs:
    """The needs of all stages that are not `done`; of `model`, the base, only shapes are looked at."""
    from ..methods import build_methods
    from ..policy.lineage import target_names  # here: needs torch

    needs, rank = list[Needs](), 0
    for stage in recipe.stages:
        if stage.k not in done:
            shapes = lora_shapes(model, target_names(model, stage.train.modules))
            needs.append(stage_needs(stage, model, shapes, rank, build_methods(recipe.method, stage.train)))
        rank = stage.train.lora.r + (rank if stage.train.lineage in ("stack", "fold") else 0)
    return Needs(sum(one.kept for one in needs), max((one.work for one in needs), default=0))


def lora_shapes(model: Any, names: Iterable[str]) -> Shapes:
    """The shapes of linear layers, [out, in]."""
    layers = ((name, model.get_submodule(name)) for name in names)
    return {name: (layer.out_features, layer.in_features) for name, layer in layers}


def check_disk(folder: Path, needs: Needs, what: str) -> None:
    """Refuse what will not fit. Raises `InputError`."""
    free = shutil.disk_usage(folder).free
    if needs.kept + needs.work > free:
        problem = f"{what} needs {size(needs.kept + needs.work)} of disk ({needs}), and {size(free)} are free"
        raise InputError(problem, where=folder, remedy="Make room, or set another --run-dir")


def size(number: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
