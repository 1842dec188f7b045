"""The formula of GPU memory against what was measured on a GPU (benchmarks/real_size.json)."""

from pathlib import Path

import pytest
import torch
from published import published
from transformers import AutoModelForImageTextToText

from mcit.data_prep.files import read_json
from mcit.pipeline.planning.formula import GIB, Training, gpu_bytes
from mcit.pipeline.policy.lineage import target_names
from mcit.pipeline.recipe.schema import ModulesConfig
from mcit.pipeline.run.disk import lora_shapes

MEASURED = read_json(Path(__file__).parents[1] / "benchmarks" / "real_size.json")["stages"]
with torch.device("meta"):
    MODEL = AutoModelForImageTextToText.from_config(published()["Qwen/Qwen2.5-VL-3B-Instruct"], dtype=torch.bfloat16)
SHAPES = lora_shapes(MODEL, target_names(MODEL, ModulesConfig()))


def allocated(**settings: int | str) -> float:
    """What torch counts as allocated: without what CUDA takes and what fragments waste."""
    parts = gpu_bytes(Training(MODEL, SHAPES, 64, **settings))  # type: ignore[arg-type]
    return sum(size for part, size in parts.items() if part != "CUDA and fragments") / GIB


def test_it_says_what_was_measured_within_a_tenth() -> None:
    """Some 295 tokens a sample; answers of up to 128 tokens, padded to the longest."""
    peaks = {(row["run"], row["stage"]): row["peak_gib"] for row in MEASURED}
    assert allocated(samples=16, tokens=295) == pytest.approx(peaks["sequential", "01-first"], rel=0.1)
    assert allocated(samples=16, tokens=295, past_rank=64) == pytest.approx(peaks["sequential", "02-second"], rel=0.1)
    assert allocated(samples=32, tokens=295 + 128, answer=128) == pytest.approx(peaks["grpo", "01-first"], rel=0.1)


def test_what_zero_shares_out_shrinks_with_the_processes() -> None:
    one = gpu_bytes(Training(MODEL, SHAPES, 64))
    two, three = (gpu_bytes(Training(MODEL, SHAPES, 64, mode=mode, processes=8)) for mode in ("zero2", "zero3"))
    assert two["frozen weights"] == one["frozen weights"] == 8 * three["frozen weights"]
    assert two["weights in training"] == three["weights in training"] < one["weights in training"]
    trained = 64 * sum(sum(shape) for shape in SHAPES.values())
    assert one["weights in training"] == 16 * trained
