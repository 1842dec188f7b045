"""What is evaluated in the place of the policy: merges, averages and interpolation, by hand and by brute force."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from training import make_samples

from mcit.data_prep.errors import InputError
from mcit.eval.lora import Dense, Factors
from mcit.pipeline.methods import METHODS, build_methods
from mcit.pipeline.methods.dare import Dare, DareConfig
from mcit.pipeline.methods.ilora import ILora, ILoraConfig
from mcit.pipeline.methods.interpolate import Interpolate, InterpolateConfig
from mcit.pipeline.methods.magmax import MagMax, MagMaxConfig
from mcit.pipeline.methods.maxmerge import MaxMerge, MaxMergeConfig
from mcit.pipeline.methods.olora import OLora, OLoraConfig, overlap
from mcit.pipeline.methods.ties import Ties, TiesConfig
from mcit.pipeline.policy.adapters import live_adapter, lora_layers
from mcit.pipeline.recipe.schema import TrainConfig


def tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def stage(k: int, lineage: str) -> Any:
    return SimpleNamespace(k=k, seed=0, train=SimpleNamespace(lineage=lineage))


def adapted() -> Any:
    base = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    base.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))


def shake(model: Any, seed: int) -> dict[str, Tensor]:
    """Other factors; what they add to each layer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, a, b, _ in lora_layers(model):
            a.normal_(generator=generator), b.normal_(generator=generator)
        return {name: scaling * b @ a for name, a, b, scaling in lora_layers(model)}


def test_magmax_by_hand() -> None:
    """The largest magnitude with its sign; of equals the later one."""
    merge = MagMax(MagMaxConfig()).merge
    assert merge("x", [tensor(1, -5, 2), tensor(-3, 4, -2), tensor(2, 0, 0)]).tolist() == [-3, -5, -2]
    assert merge("x", [tensor(1, -5)]).tolist() == [1, -5]


def test_ties_by_hand() -> None:
    """Of each vector half stays, (4, −3), (−2, 6), (5, 2); signs are those of the sums, means of those that agree."""
    vectors = [tensor(4, -3, 1, 0.5), tensor(1, 0.5, -2, 6), tensor(-1, 5, 0.5, 2)]
    assert Ties(TiesConfig(density=0.5)).merge("x", vectors).tolist() == [4, 5, -2, 4]


def test_dare_keeps_a_share_and_rescales_it() -> None:
    """What is dropped depends on seed and layer; the global generator is not touched."""
    method = Dare(DareConfig(density=0.25))
    method.stage = stage(1, "independent")
    before = torch.get_rng_state()
    ones = torch.ones(100, 100)
    merged = method.merge("x", [ones, ones])
    assert torch.equal(before, torch.get_rng_state())
    assert set(merged.unique().tolist()) == {0, 4, 8} and merged.mean().item() == pytest.approx(2, abs=0.1)
    assert torch.equal(merged, method.merge("x", [ones, ones])) and not torch.equal(
        merged, method.merge("y", [ones, ones])
    )
    signed = Dare(DareConfig(density=0.25, signs=True))
    signed.stage = method.stage
    assert set(signed.merge("x", [ones, -3 * ones]).unique().tolist()) == {0, 4, -12}


@pytest.mark.parametrize("lineage", ["continue", "independent", "stack", "fold"])
def test_task_vectors_are_what_a_policy_adds_to_the_base(lineage: str) -> None:
    """Under `stack` and `fold` a stage's adapter is only its increment, and the policy all of them."""
    model, method, state = adapted(), MagMax(MagMaxConfig(scale=0.5)), {}
    vectors: list[dict[str, Tensor]] = []
    for k in (1, 2, 3):
        method.data(stage(k, lineage), [], {}, state)
        added = shake(model, seed=k)
        if lineage in ("stack", "fold") and vectors:
            added = {name: vectors[-1][name] + change for name, change in added.items()}
        vectors.append(added)
        state = method.finish(model, [])
        served = method.served(live_adapter(model), state)
        assert served is not None
        for name in ("0", "1"):
            stacked = torch.stack([vector[name] for vector in vectors])
            largest = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
            torch.testing.assert_close(served[name].delta(), 0.5 * largest)


def test_max_merge_takes_the_maximum_of_each_factor() -> None:
    """Signs and all, so it is not the maximum of what the adapters add."""
    model, method, state = adapted(), MaxMerge(MaxMergeConfig()), {}
    factors: list[Any] = []
    for k in (1, 2):
        method.data(stage(k, "independent"), [], {}, state)
        shake(model, seed=k)
        factors.append(live_adapter(model))
        state = method.finish(model, [])
    served = method.served(factors[-1], state)
    assert served is not None
    for name, one in served.items():
        assert isinstance(one, Factors)
        assert torch.equal(one.a, torch.maximum(factors[0][name].a, factors[1][name].a))
        assert torch.equal(one.b, 3 * torch.maximum(factors[0][name].b, factors[1][name].b))  # alpha / r = 3


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_a_dense_change_is_an_adapter_of_the_smaller_sides_rank(shape: tuple[int, int]) -> None:
    change = torch.randn(shape)
    factors = Dense(change).factors()
    assert torch.equal(factors.delta(), change) and factors.a.shape[0] == 3


def test_interpolation_lies_between_the_base_and_the_policy() -> None:
    model = adapted()
    added = shake(model, seed=0)
    served = Interpolate(InterpolateConfig(share=0.3)).served(live_adapter(model), {})
    assert served is not None
    for name, change in added.items():
        torch.testing.assert_close(served[name].delta(), 0.3 * change)
    assert Interpolate(InterpolateConfig(share=1)).served(live_adapter(model), {}) is None


def test_the_slow_lora_moves_and_is_what_is_evaluated() -> None:
    """slow ← 0.75 slow + 0.25 fast at every step, from where the stage begins; the official one stays where it is."""
    model = adapted()
    method = ILora(ILoraConfig(decay=0.75))
    method.data(stage(1, "continue"), make_samples("new", 2), {}, {})
    method.build(model, {})
    shake(model, seed=0)
    slow = {name: (a.detach().clone(), b.detach().clone()) for name, a, b, _ in lora_layers(model)}
    method.begin(SimpleNamespace(), SimpleNamespace(model=model))  # type: ignore[arg-type]
    [callback] = method.callbacks()
    for step in (1, 2, 3):
        shake(model, seed=step)
        callback.on_step_end(None, None, None)  # type: ignore[arg-type]
        slow = {
            name: (0.75 * slow[name][0] + 0.25 * a.detach(), 0.75 * slow[name][1] + 0.25 * b.detach())
            for name, a, b, _ in lora_layers(model)
        }
    state = method.finish(model, [])
    assert all(torch.equal(state[name], value) for name, value in method.hand_over().items())
    served = method.served(live_adapter(model), state)
    assert served is not None
    for name, (a, b) in slow.items():
        torch.testing.assert_close(served[name].delta(), 3 * b @ a)
    again = ILora(ILoraConfig(decay=0.75))
    again.data(stage(2, "continue"), [], {}, state)
    again.build(model, state)
    again.begin(SimpleNamespace(), SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert all(torch.equal(again.slow[name], state[name]) for name in state)  # the next stage's average goes on from it


def test_the_slow_lora_of_what_another_method_freezes_stays() -> None:
    model = adapted()
    shake(model, seed=0)
    state = {name: value.detach().clone() + 1 for name, value in model.named_parameters() if "lora_" in name}
    frozen = {name for name in state if ".0." in name}
    assert frozen and frozen < set(state)
    for name, value in model.named_parameters():
        value.requires_grad_(name in state and name not in frozen)
    for known in (state, {}):
        method = ILora(ILoraConfig())
        method.data(stage(2, "continue"), [], {}, known)
        method.build(model, known)
        method.begin(SimpleNamespace(), SimpleNamespace(model=model))  # type: ignore[arg-type]
        kept = method.finish(model, [])
        served = method.served(live_adapter(model), kept)
        assert served is not None and set(kept) == (set(state) if known else set(state) - frozen)
        for name, one in live_adapter(model).items():
            held = next(key for key in state if name in key and "lora_A" in key)
            torch.testing.assert_close(served[name].a, one.a + 1 if known else one.a, msg=held)


def test_overlap_by_hand() -> None:
    """Two past rows and one new one: products 1·1 + 2·(−1) = −1 and 0·1 + 3·(−1) = −3."""
    past, a = tensor([1, 2], [0, 3]), tensor([1, -1]).requires_grad_()
    term = overlap(past, a, "l1")
    term.backward()
    assert term.item() == 4 and a.grad.tolist() == [[-1, -5]]
    assert overlap(past, a, "l2").item() == 1 + 9
    assert overlap(past, tensor([0, 0]), "l1").item() == 0


def test_olora_keeps_the_rows_of_all_stages() -> None:
    model, method, state = adapted(), OLora(OLoraConfig(weight=2)), {}
    view: Any = SimpleNamespace(model=model, last=True)
    kept: dict[str, list[Tensor]] = {"0": [], "1": []}
    for k in (1, 2, 3):
        method.build(model, state)
        shake(model, seed=k)
        term = method.loss(view)
        if k == 1:
            assert term is None  # the first stage has no past
        else:
            expected = sum((old @ a.T).abs().sum() for name, a, _, _ in lora_layers(model) for old in kept[name])
            torch.testing.assert_close(term, 2 * expected)
        state = method.finish(model, [])
        for name, a, _, _ in lora_layers(model):
            kept[name].append(a.detach().clone())
    assert state["0"].shape == (6, 4)


def test_two_methods_cannot_both_decide_what_is_evaluated() -> None:
    with pytest.raises(
        InputError, match=r"method.magmax: does not work together with ties: each has something else evaluated"
    ):
        build_methods({"magmax": {}, "ties": {}}, TrainConfig())


def test_every_merge_can_be_switched_off() -> None:
    for name in ("magmax", "ties", "dare", "maxmerge"):
        method = METHODS[name](METHODS[name].Config(merge=False))
        assert method.served({}, {}) is None and method.finish(None, []) == {}  # type: ignore[arg-type]
