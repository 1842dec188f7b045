"""How much disk a stage needs, and whether there is as much, before anything is trained."""

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import read_json
from mcit.eval.serving import read_serving

from ..planning.outlook import FLOAT, Outlook, look_through
from ..stage.checkpoints import KEPT

if TYPE_CHECKING:
    from ..methods import Method
    from ..recipe.schema import Recipe

# Of a parameter in training, in a checkpoint: it, its float32 copy and Adam's two moments. Other optimizers need less.
_CHECKPOINT_BYTES = 16


@dataclass(frozen=True)
class Needs:
    """Bytes of one stage."""

    kept: int  # adapter and increment, or a merged model, and the methods' state
    work: int  # checkpoints, while it trains

    def __str__(self) -> str:
        return f"{size(self.kept)} to keep, {size(self.work)} for checkpoints"


def stage_needs(outlook: Outlook, methods: Iterable["Method"]) -> Needs:
    """The needs of a stage that trains a LoRA, all weights, or what a method has in their place.

    Adapters are written in float32, the policy with all its ranks (`pipeline/policy/adapters.py`).
    """
    methods, train = list(methods), outlook.stage.train
    kept = sum(method.disk(outlook) for method in methods)
    if train.lineage == "full":
        kept += outlook.base_bytes
    elif not any(method.carries for method in methods):
        # What a LoRA that trains on has added is a difference, of twice its rank.
        increment = train.lora.r * (2 if outlook.resumes else 1)
        kept += FLOAT * outlook.width * (outlook.rank + increment)
    guarded = 2 * FLOAT if "rft" in train.phases and train.rft.guard else 0  # the guard's two copies
    return Needs(kept, (KEPT + 1) * (_CHECKPOINT_BYTES + guarded) * trained_parameters(outlook, methods))


def trained_parameters(outlook: Outlook, methods: Iterable["Method"]) -> int:
    """How many parameters a stage trains: those of its LoRA, the model's own, or what methods say."""
    said = (method.trains(outlook) for method in methods)
    return min((count for count in said if count is not None), default=outlook.trained)


def check_run(
    folder: Path, recipe: "Recipe", config: Any, done: Collection[int], entering_rank: int = 0, behind: int = 0
) -> None:
    """Refuse a run whose stages, but for those that are `done`, the disk does not hold. Raises `InputError`.

    `config` is the base model's; the run begins with a LoRA of `entering_rank`, `behind` stages after the base.
    """
    import torch  # here: takes seconds
    from transformers import AutoModelForImageTextToText

    base = recipe.base_model
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code
        )
    outlooks = [one for one in look_through(recipe, model, entering_rank, behind) if one.stage.k not in done]
    check_disk(folder, run_needs(recipe, outlooks), "the run")


def run_needs(recipe: "Recipe", outlooks: Iterable[Outlook]) -> Needs:
    """The needs of stages of a recipe, one after the other."""
    from ..methods import build_methods

    needs = [stage_needs(one, build_methods(recipe.method, one.stage.train)) for one in outlooks]
    return Needs(sum(one.kept for one in needs), max((one.work for one in needs), default=0))


def handed_rank(stage_dir: Path) -> int:
    """The rank of the LoRA that a stage hands on to the next one; 0 where it hands on none."""
    serving = read_serving(stage_dir)
    return int(read_json(stage_dir / serving.handed / "adapter_config.json")["r"]) if serving.handed else 0


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
