"""Freezing and HFT: which of the adapters train."""

import random
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from training import tiny_model

from mcit.pipeline.methods.freeze import Freeze, FreezeConfig, decoder_blocks
from mcit.pipeline.methods.hft import Hft, HftConfig, drawn, matrix
from mcit.pipeline.policy.adapters import pattern
from mcit.pipeline.policy.lineage import target_names
from mcit.pipeline.recipe.schema import ModulesConfig


@pytest.fixture
def model() -> Any:
    base = tiny_model()
    return get_peft_model(base, LoraConfig(r=2, target_modules=pattern(target_names(base, ModulesConfig()))))


def trained(model: Any) -> list[set[str]]:
    """By block, the layers whose adapter trains, both factors of it."""
    found = []
    for block in decoder_blocks(model):
        factors = [matrix(name) for name, parameter in block.named_parameters() if parameter.requires_grad]
        assert all(factors.count(name) == 2 for name in factors)
        found.append(set(factors))
    return found


def test_the_first_or_the_last_blocks_train(model: Any) -> None:
    everything, count = trained(model), len(decoder_blocks(model))
    assert all(len(layers) == 7 for layers in everything)
    Freeze(FreezeConfig(blocks="first", share=0.5)).build(model, {})
    half = round(count / 2)
    assert trained(model) == everything[:half] + [set()] * (count - half)


def test_at_least_one_block_trains(model: Any) -> None:
    everything, count = trained(model), len(decoder_blocks(model))
    Freeze(FreezeConfig(share=1)).build(model, {})
    assert trained(model) == everything
    Freeze(FreezeConfig(blocks="last", share=0.01)).build(model, {})
    assert trained(model) == [set()] * (count - 1) + everything[-1:]


def test_half_of_each_blocks_attention_and_of_its_mlp_train(model: Any) -> None:
    """Of three matrices of the MLP, two in one half of the blocks and one in the other."""
    method = Hft(HftConfig())
    method.rng = random.Random(0)
    method.build(model, {})
    attention = [sum("self_attn" in name for name in layers) for layers in trained(model)]
    mlp = sorted(sum("mlp" in name for name in layers) for layers in trained(model))
    assert set(attention) == {2} and set(mlp) <= {1, 2} and abs(sum(mlp) - 1.5 * len(mlp)) <= 0.5


def test_of_whole_weights_half_of_each_blocks_norms_train_too() -> None:
    """A bias goes with its matrix; what is outside the blocks trains."""
    model = tiny_model().requires_grad_(False)
    model.get_decoder().requires_grad_(True)
    method = Hft(HftConfig())
    method.rng = random.Random(0)
    method.build(model, {})
    for block in decoder_blocks(model):
        layers: dict[str, set[bool]] = {}
        for name, parameter in block.named_parameters():
            layers.setdefault(matrix(name), set()).add(parameter.requires_grad)
        assert all(len(trains) == 1 for trains in layers.values())
        for part, count in (("norm", 2), ("self_attn", 4)):
            trains = [trains for name, trains in layers.items() if part in name]
            assert len(trains) == count and trains.count({True}) == count / 2
    decoder = model.get_decoder()
    assert decoder.embed_tokens.weight.requires_grad and decoder.norm.weight.requires_grad


def test_what_trains_is_drawn_anew_in_each_stage() -> None:
    groups = [[f"{block}.{name}" for name in "qkvo"] for block in range(10)]
    first, again, other = (drawn(groups, 0.5, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 20
    assert all(sum(name in first for name in group) == 2 for group in groups)


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.6, 0.99])
def test_a_share_holds_in_every_group_and_over_all_of_them(share: float) -> None:
    groups = [[f"{block}.{name}" for name in ("gate", "up", "down")] for block in range(11)]
    chosen = drawn(groups, share, random.Random(0))
    assert len(set(chosen)) == len(chosen) == round(share * 33)
    assert all(abs(sum(name in chosen for name in group) - 3 * share) < 1 for group in groups)
