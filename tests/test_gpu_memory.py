"""The formula of a training process's memory against what was measured on a GPU (benchmarks/real_size.json)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from published import published
from transformers import AutoModelForImageTextToText

from mcit.data_prep.files import read_json
from mcit.pipeline.planning.memory import NF4_BITS, Memory, Training, measure, training_memory, weight_bytes
from mcit.pipeline.planning.outlook import Outlook, look_ahead
from mcit.pipeline.recipe.loading import load_recipe

GIB = 2**30
MEASURED = read_json(Path(__file__).parents[1] / "benchmarks" / "real_size.json")["stages"]
STAGE = load_recipe("mini/sequential", ["train.lora.r=64"]).stages[0]


def meta_model(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(published()[name], dtype=torch.bfloat16)


MODEL = meta_model("Qwen/Qwen2.5-VL-3B-Instruct")
SHAPES = measure(MODEL)
OUTLOOK: Outlook = look_ahead(STAGE, MODEL, 0, 0)


def memory(**settings: Any) -> Memory:
    return training_memory(Training(SHAPES, OUTLOOK.lora, OUTLOOK.width, **settings))


def test_it_says_what_was_measured() -> None:
    """Some 295 tokens a sample, no accumulation; GRPO without dropout, its answers padded to the longest, of 128."""
    peaks = {(row["run"], row["stage"]): row["peak_gib"] * GIB for row in MEASURED}
    sft = {"samples": 16, "tokens": 295, "accumulates": False}
    grpo = {"samples": 32, "tokens": 295 + 128, "at_once": 32, "accumulates": False, "dropout": False}
    assert memory(**sft).total == pytest.approx(peaks["sequential", "01-first"], rel=0.01)
    assert memory(**sft, past_rank=64).total == pytest.approx(peaks["sequential", "02-second"], rel=0.01)
    assert memory(**grpo).total == pytest.approx(peaks["grpo", "01-first"], rel=0.03)


def test_gradients_come_as_activations_go_unless_they_are_summed() -> None:
    n, kept = OUTLOOK.lora, 2 * 36 * 2048  # bytes a token
    few, many = (memory(samples=1, tokens=tokens, accumulates=False) for tokens in (100, 100_000))
    assert few.gradients == 4 * n - 100 * kept and many.gradients == 0
    assert memory(samples=1, tokens=100_000).gradients == 4 * n
    assert memory(samples=1, tokens=200).activations == 2 * memory(samples=1, tokens=100).activations
    assert memory(checkpointing=False).activations > 5 * memory().activations


def test_what_zero_shares_out_shrinks_with_the_processes() -> None:
    n = OUTLOOK.lora
    one, ddp = memory(), memory(mode="ddp", processes=8)
    two, three = (memory(mode=mode, processes=8) for mode in ("zero2", "zero3"))
    assert ddp.total == one.total + 4 * n  # a second copy of the gradients
    assert two.weights == one.weights == 8 * three.weights
    assert two.trained == three.trained == n * (2 + 18 / 8) < one.trained + one.gradients == 16 * n
    assert two.exchange == 1e9 and three.exchange == 3e9
    assert memory(mode="zero3", processes=64).total < three.total < two.total


def test_weights_in_training_are_float32_and_the_model_s_own_count_once() -> None:
    frozen = SHAPES.parameters - 10**9
    whole = training_memory(Training(SHAPES, 10**9, 0, whole=True))
    assert whole.weights == 4 * frozen and whole.trained + whole.gradients == 16e9
    nf4 = weight_bytes(SHAPES, "bfloat16", "nf4")
    assert nf4 == 2 * (SHAPES.parameters - SHAPES.linear) + SHAPES.linear * NF4_BITS / 8
    assert pytest.approx(4.127, abs=1e-3) == NF4_BITS


def test_of_a_mixture_a_token_goes_through_its_experts() -> None:
    """Qwen3-VL-30B-A3B: attention 17,408, and eight experts of 6,400 each (by hand: 1536 + 2048 and 768 + 2048)."""
    found = measure(meta_model("Qwen/Qwen3-VL-30B-A3B-Instruct"))
    attention = (2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048)
    assert found.per_layer == attention + 8 * 6400
    assert SHAPES.per_layer == OUTLOOK.width / 36 == 51968
    assert OUTLOOK.lora == pytest.approx(120e6, rel=0.01)
