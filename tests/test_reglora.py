"""RegLoRA against numbers worked out by hand, the dense form, and the official index form."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcit.data_prep.errors import InputError
from mcit.pipeline.methods import StepView, keys
from mcit.pipeline.methods.keys import MeanAtKeys, add_keys, pack, total, unpack
from mcit.pipeline.methods.reglora import RegLora, RegLoraConfig, deal
from mcit.pipeline.policy.adapters import lora_layers

BITS = {"union": 1, "multiset": 4}


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


# b a = [[1, 2, 3, 4], [-2, -4, -6, -8], [0, 0, 0, 0]]
A, B = tensor([1, 2, 3, 4]), tensor([1], [-2], [0])


def counts(**at: int) -> Tensor:
    """Counts for `b a`: `counts(_03=2)` is 2 in row 0, column 3."""
    found = torch.zeros(3, 4, dtype=torch.uint8)
    for place, count in at.items():
        found[int(place[1]), int(place[2])] = count
    return found


def mean(a: Tensor, b: Tensor, counts: Tensor, bits: int = 4) -> Tensor:
    packed = pack(counts, bits)
    return MeanAtKeys.apply(a, b, packed, bits, total(packed, bits))


def dense_mean(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    return (counts * (b @ a).abs()).sum() / counts.sum()


def dense_keys(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Of equal values the first ones, row by row; zeros never."""
    size = (b @ a).abs()
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.flatten().sort(descending=True, stable=True).indices[: int(fraction * size.numel())]] = True
    return mask.view_as(size) & (size > 0)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Multiples of `scale` from -3 to 3: products are exact in any order of summation, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randint(-3, 4, shape, generator=generator).float()


@pytest.fixture(params=[1, 40, 1 << 21])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of one row, of a few rows with a smaller last one, and of everything."""
    monkeypatch.setattr(keys, "_TILE", {"cpu": request.param})
    return request.param


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("columns", [8, 13, 1])
def test_counts_survive_packing(bits: int, columns: int) -> None:
    before = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(before, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), before)
    assert total(packed, bits) == before.sum()


def test_keys_are_the_largest_changes() -> None:
    def found(fraction: float) -> list[list[int]]:
        return unpack(add_keys(None, A, B, fraction, 1), 1, 4).nonzero().tolist()

    assert found(0.25) == [[0, 3], [1, 2], [1, 3]]  # int(0.25 · 12) = 3: |-8|, |-6|, and of the two 4s the first
    assert found(0.24) == [[1, 2], [1, 3]]  # int(2.88) = 2
    assert found(0.05) == []  # int(0.6) = 0
    assert len(found(0.9)) == 8  # ten are asked for, but what did not change is no key
    assert not add_keys(None, A, torch.zeros(3, 1), 0.9, 1).any()


@pytest.mark.parametrize("overlap", BITS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 11), (16, 24), (1, 30), (30, 1)])
@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.97])
def test_keys_of_three_tasks_are_those_of_the_dense_form(
    tile: int, overlap: str, rows: int, columns: int, fraction: float
) -> None:
    packed, dense = None, torch.zeros(rows, columns, dtype=torch.uint8)
    for task in range(3):
        a, b = draw(3, columns, seed=task), draw(rows, 3, seed=task + 10, scale=0.125)
        packed = add_keys(packed, a, b, fraction, BITS[overlap])
        dense += dense_keys(a, b, fraction)
    assert torch.equal(unpack(packed, BITS[overlap], columns), dense if overlap == "multiset" else dense.clamp(max=1))


def test_a_count_stops_at_15_and_a_bit_at_1() -> None:
    for bits, most in ((4, 15), (1, 1)):
        packed = None
        for _ in range(20):
            packed = add_keys(packed, A, B, 0.1, bits)
        assert torch.equal(unpack(packed, bits, 4), counts(_13=most))


def test_mean_by_hand() -> None:
    # (1·|1| + 2·|-8| + 1·|0|) / 4 = 4.25; a position that two tasks kept counts twice
    assert mean(A, B, counts(_00=1, _13=2, _22=1)).item() == pytest.approx(4.25)
    assert mean(A, B, counts(_00=1, _13=1, _22=1), bits=1).item() == pytest.approx((1 + 8 + 0) / 3)


def test_gradient_by_hand() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    (2 * mean(a, b, counts(_13=3, _00=1))).backward()
    # d/dBA = 2 · count · sign / 4: 2·3·(-1)/4 at (1, 3), 2/4 at (0, 0); dA = Bᵀ G, dB = G Aᵀ
    assert torch.allclose(a.grad, tensor([0.5, 0, 0, -2 * -1.5]))
    assert torch.allclose(b.grad, tensor([0.5 * 1], [-1.5 * 4], [0]))


def test_untrained_adapter_costs_nothing_and_pulls_nowhere() -> None:
    a, b = A.clone().requires_grad_(), torch.zeros(3, 1, requires_grad=True)
    term = mean(a, b, torch.ones(3, 4, dtype=torch.uint8))
    term.backward()
    assert term.item() == 0 and not a.grad.any() and not b.grad.any()


def random_case(dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits)
    a, b = torch.randn(5, 27, generator=generator), torch.randn(19, 5, generator=generator)
    found = torch.randint(0, 2**bits, (19, 27), generator=generator).to(torch.uint8)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), found


@pytest.mark.parametrize("bits", [1, 4])
def test_value_and_gradients_are_those_of_the_dense_form(tile: int, bits: int) -> None:
    a, b, found = random_case(torch.float32, bits)
    ours, dense = mean(a, b, found, bits), dense_mean(a, b, found)
    torch.testing.assert_close(ours, dense)
    for mine, theirs in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(dense, (a, b)), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("bits", [1, 4])
def test_gradients_are_those_of_the_value(tile: int, bits: int) -> None:
    a, b, found = random_case(torch.float64, bits)
    assert torch.autograd.gradcheck(lambda a, b: mean(a, b, found, bits), (a, b))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_the_gradients_alone(autocast: bool) -> None:
    """Products are in float32, for factors in bfloat16 and under autocast."""
    a, b, found = random_case(torch.float32 if autocast else torch.bfloat16, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = mean(a, b, found)
    dense = dense_mean(a.float(), b.float(), found)
    torch.testing.assert_close(ours, dense)
    for mine, theirs in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(dense, (a, b)), strict=True):
        assert mine.dtype == a.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-5 if autocast else 2**-7, atol=1e-6)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_the_product_is_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_TILE", {"cpu": 1000})
    a, b = torch.randn(4, 100, requires_grad=True), torch.randn(500, 4, requires_grad=True)
    with Largest() as largest:
        packed = add_keys(None, a, b, 0.02, 1)
        MeanAtKeys.apply(a, b, packed, 1, total(packed, 1)).backward()
    assert packed.numel() == 500 * 13 and a.grad.any()
    assert 1000 <= largest.elements <= packed.numel() < b.shape[0] * a.shape[1] / 7


def peft_model() -> Any:
    base = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    base.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)
    return get_peft_model(base, LoraConfig(r=1, lora_alpha=16, target_modules=["0", "1"]))


def view(model: Any, last: bool = True, process: int = 0, processes: int = 1) -> StepView:
    return StepView(
        model, {}, replayed=0, step=0, micro_batches=2, share=0.5, last=last, process=process, processes=processes
    )


def test_three_stages_through_the_hooks() -> None:
    method, model = RegLora(RegLoraConfig(key_fraction=0.1, weight=10)), peft_model()
    factors = {name: (a, b) for name, a, b, _ in lora_layers(model)}
    method.build(model, {})
    assert method.loss(view(model)) is None  # the first stage has no keys
    with torch.no_grad():
        factors["0"][0].copy_(A), factors["0"][1].copy_(B)
        factors["1"][0].fill_(1.0), factors["1"][1].zero_()  # a layer that did not train leaves no key
    state = method.finish(model, [])
    assert torch.equal(unpack(state["0"], 4, 4), counts(_13=1)) and not state["1"].any()  # int(0.1 · 12) = 1
    method.build(model, state)
    # |-8| at the key, over two layers, of which one has none; alpha/r has no part in it
    assert method.loss(view(model)).item() == pytest.approx(10 * 8 / 2)
    assert method.loss(view(model, last=False)) is None
    state = method.finish(model, [])
    assert torch.equal(unpack(state["0"], 4, 4), counts(_13=2))  # the same position again


def test_parity_with_the_official_index_form() -> None:
    """SEFE's code: position lists of all earlier tasks concatenated, fancy indexing, mean; then mean over layers."""
    method, model = RegLora(RegLoraConfig(key_fraction=0.2, weight=2500)), peft_model()
    layers = {name: (a, b) for name, a, b, _ in lora_layers(model)}
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    indices = {name: torch.empty(0, 2, dtype=torch.int64) for name in layers}
    for _ in range(4):
        with torch.no_grad():
            for factor in (factor for pair in layers.values() for factor in pair):
                factor.normal_(generator=generator)
        method.build(model, state)
        if state:
            ours = method.loss(view(model))
            terms = [(b @ a)[indices[n][:, 0], indices[n][:, 1]].abs().mean() for n, (a, b) in layers.items()]
            official = 2500 * sum(terms) / len(layers)
            torch.testing.assert_close(ours, official)
            factors = [factor for pair in layers.values() for factor in pair]
            for mine, theirs in zip(
                torch.autograd.grad(ours, factors), torch.autograd.grad(official, factors), strict=True
            ):
                torch.testing.assert_close(mine, theirs)
        state = method.finish(model, [])
        for name, (a, b) in layers.items():
            size = (b @ a).detach().abs()
            top = size.flatten().topk(int(0.2 * size.numel())).indices
            found = torch.stack([top // size.shape[1], top % size.shape[1]], dim=1)
            indices[name] = torch.cat([found, indices[name]])
    assert unpack(state["0"], 4, 4).max() > 1  # overlap occurs, so counting and not counting it differ


def test_the_layers_are_dealt_out_evenly() -> None:
    sizes = {"q": 4, "k": 1, "v": 1, "o": 4, "gate": 11, "up": 11, "down": 11}
    assert deal(sizes, 1) == [["gate", "up", "down", "q", "o", "k", "v"]]
    parts = deal(sizes, 4)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert [sum(sizes[name] for name in part) for part in parts] == [11, 11, 11, 10]
    assert deal({"q": 4}, 2) == [["q"], []]


@pytest.mark.parametrize("processes", [2, 3])
def test_what_the_processes_return_averages_to_the_whole(processes: int) -> None:
    """Value and gradients; with three, one has no layer and returns a zero."""
    model, bits = peft_model(), 4
    state = {name: pack(torch.full((b.shape[0], a.shape[1]), 3, dtype=torch.uint8), bits) for name, a, b, _ in
             lora_layers(model)}  # fmt: skip
    factors = [factor.requires_grad_() for _, a, b, _ in lora_layers(model) for factor in (a, b)]
    with torch.no_grad():
        for factor in factors:
            factor.normal_(generator=torch.Generator().manual_seed(1))

    def run(process: int, processes: int) -> list[Tensor]:
        method = RegLora(RegLoraConfig(weight=7))
        method.build(model, state)
        term = method.loss(view(model, process=process, processes=processes))
        if not term.requires_grad:
            return [term] + [torch.zeros_like(factor) for factor in factors]
        return [term.detach(), *torch.autograd.grad(term, factors, allow_unused=True, materialize_grads=True)]

    alone = run(0, 1)
    parts = zip(*(run(process, processes) for process in range(processes)), strict=True)
    assert alone[0] > 0
    for whole, part in zip(alone, parts, strict=True):
        torch.testing.assert_close(torch.stack(part).mean(0), whole)


def test_keys_of_the_other_overlap_are_refused() -> None:
    model = peft_model()
    state = {"0": pack(counts(_13=1), 4)}
    RegLora(RegLoraConfig()).build(model, state)
    with pytest.raises(InputError, match=r"method.reglora.overlap: the keys of 0 are \(3, 2\) bytes, not \(3, 1\)"):
        RegLora(RegLoraConfig(overlap="union")).build(model, state)


def test_neutral_weight_does_nothing() -> None:
    method, model = RegLora(RegLoraConfig(weight=0)), peft_model()
    method.build(model, {"0": pack(counts(_13=1), 4)})
    assert method.loss(view(model)) is None
    assert method.finish(model, []) == {}
