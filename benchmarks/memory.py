"""The GPU memory of a stage at published sizes, by `mcit.pipeline.planning.formula`; on the meta device, not run.

    python benchmarks/memory.py          # the tables of docs/cluster.md

LoRA of rank 64 on the language model, bfloat16, AdamW, gradient checkpointing; a sample has 2,048 tokens.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from published import published

from mcit.pipeline.planning.formula import GIB, Training, gpu_bytes
from mcit.pipeline.policy.lineage import target_names
from mcit.pipeline.recipe.schema import ModulesConfig
from mcit.pipeline.run.disk import lora_shapes

MODELS = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-30B-A3B-Instruct")
RANK = 64
HARDWARE = (
    ("1 GPU", "single", 1),
    ("8, `zero2`", "zero2", 8),
    ("8, `zero3`", "zero3", 8),
    ("32, `zero3`", "zero3", 32),
)


def meta_model(name: str) -> Any:
    """A published model of which there are only shapes."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(published()[name], dtype=torch.bfloat16)


def rows() -> Iterable[list[str]]:
    for name in MODELS:
        model = meta_model(name)
        shapes = lora_shapes(model, target_names(model, ModulesConfig()))
        for label, mode, processes in HARDWARE:
            cells = []
            for samples, answer, past in ((1, 0, 0), (8, 0, 0), (1, 0, 7 * RANK), (8, 512, 0)):
                training = Training(model, shapes, RANK, past, mode, processes, samples, 2048, answer)
                cells.append(f"{sum(gpu_bytes(training).values()) / GIB:.0f}")
            yield [name.removeprefix("Qwen/").removesuffix("-Instruct"), label, *cells]


def main() -> None:
    head = ["model", "GPUs", "SFT, 1 sample", "8 samples", "1, after 7 stages of `stack`", "RFT, 8 answers of 512"]
    for cells in (head, ["---"] * len(head), *rows()):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
