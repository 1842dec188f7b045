"""What of a plan will not fit, each with what to do about it."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan

_GIB = 2**30
_RESERVE = 0.9  # of a GPU's memory: what vLLM takes by default, and what training can count on


def misfits(found: "Plan", gpu_memory: float | None) -> list[str]:
    """What does not fit GPUs of `gpu_memory` GiB (None: they are not known), and the disk of this machine."""
    problems = []
    if gpu_memory is not None:
        room = gpu_memory * _GIB * _RESERVE
        for row in found["stages"]:
            if row["memory_total"] > room:
                problems.append(
                    f"stage {row['stage']} trains in {row['memory_total'] / _GIB:.1f} GiB, and {room / _GIB:.1f} of "
                    f"{gpu_memory:g} can be counted on: lower train.{row['paradigm']}.args."
                    "per_device_train_batch_size or base_model.processor.max_pixels, or set base_model.quantization: "
                    "nf4"
                )
        if found["engine_memory_total"] > room:
            problems.append(
                f"vLLM needs {found['engine_memory_total'] / _GIB:.1f} GiB, and takes {room / _GIB:.1f} of "
                f"{gpu_memory:g}: lower eval.max_model_len"
            )
    here = next(parent for parent in Path("runs").absolute().parents if parent.exists())
    needed, free = found["disk"]["stages"] + found["disk"]["checkpoints"], shutil.disk_usage(here).free
    if needed > free:
        problems.append(f"the stages need {needed / _GIB:.1f} GiB on disk, and {here} has {free / _GIB:.1f} free")
    return problems
