"""A stage's policy as one model (`mcit.eval.engines.merging`), held against its adapter.

Merging rounds: what a merged model answers is not bit for bit what the adapter beside the base answers. How far apart
they are is measured on the same prompts, and printed.
"""

import shutil
from pathlib import Path
from typing import TypedDict

from mcit.data_prep.errors import InputError
from mcit.eval.cells import load_cell, resume
from mcit.eval.engines.base import Policy, read_policy
from mcit.eval.engines.merging import write_merged
from mcit.eval.evaluate import choose_probes
from mcit.eval.hashing import cache_dir, hash_model
from mcit.eval.liveness import log_prob_gap, transformers_scores
from mcit.eval.lora import load_adapter

from ..recipe.schema import Recipe


class Exported(TypedDict):
    """What was written, and how it compares with the adapter beside the base. Gaps in nats a token."""

    stage: int
    name: str
    folder: str
    hash: str
    dtype: str
    probes: int
    gap_max: float | None  # None: the policy is a merged model, and was copied
    gap_mean: float | None


def export(recipe: Recipe, run_dir: Path, stage: int | None, out: Path) -> Exported:
    """Write the policy of `stage` (None: of the last that is done) to the folder `out` as a whole model.

    Needs the stage's prepared data, for the comparison. Raises `InputError`; `out` is whole or absent.
    """
    if out.exists():
        raise InputError("exists", where=out, field="--out", remedy="Name a new folder")
    policy = read_policy(_stage_folder(recipe, run_dir, stage))
    serving = policy.serving
    if serving.kind == "extended":
        problem = f"stage {serving.stage} is modules of a method's own on the base, which no merge holds"
        raise InputError(problem, where=policy.folder, field="kind", remedy="Publish it: `mcit publish`")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    exported: Exported = {
        "stage": serving.stage,
        "name": serving.name,
        "folder": str(out),
        "hash": "",
        "dtype": serving.dtype,
        "probes": 0,
        "gap_max": None,
        "gap_mean": None,
    }
    try:
        if policy.adapter is None:
            shutil.copytree(policy.model, partial)
        else:
            write_merged(serving, load_adapter(policy.adapter), partial)
        exported["hash"] = hash_model(str(partial))
        if policy.adapter is not None:
            exported |= _compared(recipe, run_dir, policy, partial, exported["hash"])
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _stage_folder(recipe: Recipe, run_dir: Path, stage: int | None) -> Path:
    done = [one for one in recipe.stages if (run_dir / "stages" / one.folder / "done.json").exists()]
    chosen = [one for one in done if stage in (None, one.k)]
    if not chosen:
        known = ", ".join(str(one.k) for one in done) or "none yet"
        problem = "no stage is done" if stage is None else f"stage {stage} is not done"
        raise InputError(problem, where=run_dir, field="--stage", remedy=f"Done: {known}")
    return run_dir / "stages" / chosen[-1].folder


def _compared(recipe: Recipe, run_dir: Path, policy: Policy, folder: Path, digest: str) -> "Exported":
    """Log-probabilities of merged model and adapter on the probes of the tasks that were learned by then."""
    update = {"kind": "merged", "path": ".", "rank": None, "hash": digest}
    merged = Policy(policy.serving.model_copy(update=update), folder)
    learned = [task for task, first in recipe.learned.items() if first <= policy.serving.stage]
    cells = [load_cell(run_dir, policy.serving.stage, task, recipe.eval) for task in learned]
    for cell in cells:
        resume(cell, cache_dir())
    probes = choose_probes(cells, recipe.eval.probes)
    scores = transformers_scores([policy, merged], probes, recipe.eval)
    one, other = scores[policy.serving.hash], scores[digest]
    return {
        "probes": len(probes),
        "gap_max": log_prob_gap(one, other, "float32")[0],
        "gap_mean": log_prob_gap(one, other, "bfloat16")[0],
    }  # type: ignore[typeddict-item]
