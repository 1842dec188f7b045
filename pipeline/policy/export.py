"""A stage's policy as one model: merged in float32 into the untouched base, rounded once, and held against its adapter.

Merging rounds: what a merged model answers is not bit for bit what the adapter beside the base answers. How far apart
they are is measured on the same prompts, and printed.
"""

import shutil
from pathlib import Path
from typing import TypedDict

from safetensors.torch import load_file, save_file

from mcit.data_prep.errors import InputError
from mcit.eval.cells import load_cell, resume
from mcit.eval.engines.base import Policy, read_policy
from mcit.eval.evaluate import choose_probes
from mcit.eval.hashing import cache_dir, hash_model, model_folder
from mcit.eval.liveness import log_prob_gap, transformers_scores

from ..recipe.schema import Recipe
from .adapters import load_adapter
from .lineage import fold


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
            _merge(recipe, policy, partial)
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


def _merge(recipe: Recipe, policy: Policy, folder: Path) -> None:
    """Write the base with the adapter added to it, in the layout of the base's own files.

    transformers keeps the tensor names that a model was loaded under, but writes a mixture's experts transposed. So
    what LoRA cannot have changed, all that is no matrix, is copied from the base.
    """
    from ..stage.entering import load_model, load_processor  # here: needs trl

    assert policy.adapter is not None
    unquantised = {"path": policy.serving.base, "revision": policy.serving.revision, "quantization": "none"}
    base = recipe.base_model.model_copy(update=unquantised)
    model = load_model(base)
    fold(model, load_adapter(policy.adapter))
    model.save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    sources = sorted(model_folder(base.path, base.revision).glob("*.safetensors"))
    originals = {name: tensor for file in sources for name, tensor in load_file(file).items() if tensor.ndim != 2}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        kept = {name: originals[name].to(tensors[name].dtype) for name in tensors.keys() & originals.keys()}
        save_file({**tensors, **kept}, file, metadata={"format": "pt"})


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
