"""What a stage depends on: its fingerprint decides whether it is done, and whose a checkpoint is."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mcit.data_prep.prepare import read_task
from mcit.eval.scorers import scorer_identity
from mcit.eval.scoring import scorers_of
from mcit.eval.serving import read_serving

from ..recipe.schema import WITHOUT_EFFECT, Recipe, Stage
from .start import stages_behind, state_hash


def stage_inputs(recipe: Recipe, stage: Stage, run_dir: Path, entering: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe of a stage, the data it trains on, and what it enters with; hardware is no part of it.

    `entering` has the hashes of the stage before: `policy` and `state`, as `entering_hashes` finds them.
    """
    row0, during = read_serving(run_dir / "stages" / "00-base"), recipe.eval.during
    tasks = {name: read_task(run_dir / "data" / name) for name in (*stage.tasks, *stage.visitors)}
    anchors = {anchor.name: read_task(run_dir / "data" / anchor.name)["train_hash"] for anchor in recipe.anchors}
    behind, quantization = stages_behind(run_dir / "stages" / "00-base"), recipe.base_model.quantization
    seen = [name for name, first in recipe.learned.items() if first <= stage.k]
    return {
        "stage": stage.k,
        "train": stage.train.identity(),
        "method": _methods(recipe),
        "seed": recipe.seed,
        "base": row0.model_dump(include={"base_hash", "dtype", "processor", "trust_remote_code"}),
        "data": {name: task["train_hash"] for name, task in tasks.items()},
        **({"anchors": anchors} if anchors else {}),
        **({"blur": recipe.blur, "homes": [stage.tasks for stage in recipe.stages]} if recipe.blur else {}),
        "rewards": {name: scorers_of(task) for name, task in tasks.items() if "rft" in stage.train.phases},
        **({"code": code} if (code := _own_code(recipe, stage)) else {}),
        **({"behind": behind} if behind else {}),
        **({"quantization": quantization} if quantization != "none" else {}),
        "policy": row0.base_hash if stage.train.lineage == "independent" else entering["policy"],
        "state": entering["state"],
        # Part of what a stage makes, since nobody can look into its training afterwards.
        **({"during": during.model_dump() | {"test": hashes_of_test_sets(run_dir, seen)}} if during else {}),
    }


def _methods(recipe: Recipe) -> dict[str, Any]:
    """The methods' settings; where ASD's converter is reached changes nothing that it wrote."""
    return recipe.method | ({"asd": recipe.asd.identity()} if recipe.asd else {})


def _own_code(recipe: Recipe, stage: Stage) -> list[str]:
    """The code of the user's own methods and rewards, which are named as `module:name`."""
    rewards = stage.train.rft.rewards if "rft" in stage.train.phases else {}
    return [scorer_identity(name) for name in sorted({*recipe.method, *rewards}) if ":" in name]


def effective_recipe(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe can change its result."""
    return recipe.model_dump(mode="json", exclude={"train": WITHOUT_EFFECT, "publish": True})


def entering_hashes(before: Path) -> dict[str, Any]:
    """The hashes of what a stage's folder hands on: `policy`, and `state` of the methods (None: they have none)."""
    return {"policy": read_serving(before).hash, "state": state_hash(sorted((before / "method").glob("*")))}


def hashes_of_test_sets(run_dir: Path, names: Iterable[str]) -> dict[str, str]:
    """The hashes of tasks' test sets."""
    return {name: read_task(run_dir / "data" / name)["test_hash"] for name in names}
