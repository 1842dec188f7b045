"""RegLoRA against numbers worked out by hand, and against the official index form."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mcit.pipeline.adapters import lora_layers
from mcit.pipeline.methods import StepView
from mcit.pipeline.methods.reglora import RegLora, RegLoraConfig, add_keys, key_mask, penalty


def tensor(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


# b a = [[1, 2, 3, 4], [-2, -4, -6, -8], [0, 0, 0, 0]]
A, B = tensor([1, 2, 3, 4]), tensor([1], [-2], [0])


def test_keys_are_the_largest_changes() -> None:
    mask = key_mask(A, B, 0.25)  # int(0.25 · 12) = 3: |-8|, |-6|, and of the two 4s whichever
    assert mask.sum() == 3 and mask[1, 3] and mask[1, 2] and (mask[1, 1] or mask[0, 3])
    assert key_mask(A, B, 0.24).sum() == 2  # int(2.88) = 2
    assert key_mask(A, B, 0.05).sum() == 0  # int(0.6) = 0
    assert key_mask(A, B, 0.9).sum() == 8  # ten are asked for, but what did not change is no key


def test_penalty_by_hand() -> None:
    counts = {"x": torch.zeros(3, 4, dtype=torch.uint8)}
    counts["x"][0, 0], counts["x"][1, 3], counts["x"][2, 2] = 1, 2, 1
    # (1·|1| + 2·|-8| + 1·|0|) / 4 = 4.25
    assert penalty([("x", A, B)], counts).item() == pytest.approx(4.25)
    # the divisor is the number of layers, with keys or without
    assert penalty([("x", A, B), ("y", A, B)], counts).item() == pytest.approx(4.25 / 2)
    union = {"x": counts["x"].bool()}
    assert penalty([("x", A, B)], union).item() == pytest.approx((1 + 8 + 0) / 3)
    assert penalty([("x", A, B)], {"x": torch.zeros(3, 4, dtype=torch.uint8)}).item() == 0  # not 0 / 0


def test_gradient_by_hand() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    counts = {"x": torch.zeros(3, 4, dtype=torch.uint8)}
    counts["x"][1, 3], counts["x"][0, 0] = 3, 1
    penalty([("x", a, b)], counts).backward()
    # d/dBA = count · sign / 4: 3·(-1)/4 at (1, 3), 1/4 at (0, 0); dA = Bᵀ G, dB = G Aᵀ
    assert torch.allclose(a.grad, tensor([0.25, 0, 0, -2 * -0.75]))
    assert torch.allclose(b.grad, tensor([0.25 * 1], [-0.75 * 4], [0]))


def test_untrained_adapter_costs_nothing_and_pulls_nowhere() -> None:
    a, b = A.clone().requires_grad_(), torch.zeros(3, 1, requires_grad=True)
    term = penalty([("x", a, b)], {"x": torch.ones(3, 4, dtype=torch.uint8)})
    term.backward()
    assert term.item() == 0 and not a.grad.any() and not b.grad.any()


def test_multiset_counts_a_key_each_time_union_once() -> None:
    first, second = tensor([1, 1, 0]).bool(), tensor([1, 0, 0]).bool()
    counts = add_keys(add_keys(None, first, "multiset"), second, "multiset")
    assert counts.dtype == torch.uint8 and counts.tolist() == [[2, 1, 0]]
    joined = add_keys(add_keys(None, first, "union"), second, "union")
    assert joined.dtype == torch.bool and joined.tolist() == [[True, True, False]]
    for _ in range(300):
        counts = add_keys(counts, first, "multiset")
    assert counts.tolist() == [[255, 255, 0]]  # full, not wrapped around


def test_parity_with_the_official_index_form() -> None:
    """SEFE's code: position lists of all earlier tasks concatenated, fancy indexing, mean; then mean over layers."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    layers = {"q": (7, 11), "down": (5, 13)}
    past = [{name: (draw(2, c), draw(r, 2)) for name, (r, c) in layers.items()} for _ in range(3)]
    counts: dict[str, torch.Tensor] = {}
    indices: dict[str, torch.Tensor] = {}
    for task in past:
        for name, (a, b) in task.items():
            counts[name] = add_keys(counts.get(name), key_mask(a, b, 0.2), "multiset")
            size = (b @ a).abs()
            top = size.flatten().topk(int(0.2 * size.numel())).indices
            found = torch.stack([top // size.shape[1], top % size.shape[1]], dim=1)
            indices[name] = torch.cat([found, indices[name]]) if name in indices else found
    assert any((count > 1).any() for count in counts.values())  # overlap occurs, so the forms could differ
    now = {name: (draw(2, c).requires_grad_(), draw(r, 2).requires_grad_()) for name, (r, c) in layers.items()}
    ours = penalty([(name, a, b) for name, (a, b) in now.items()], counts)
    official = sum((b @ a)[indices[n][:, 0], indices[n][:, 1]].abs().mean() for n, (a, b) in now.items()) / len(layers)
    torch.testing.assert_close(ours, official)
    factors = [factor for pair in now.values() for factor in pair]
    for mine, theirs in zip(torch.autograd.grad(ours, factors), torch.autograd.grad(official, factors), strict=True):
        torch.testing.assert_close(mine, theirs)


def peft_model() -> object:
    base = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    base.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)
    return get_peft_model(base, LoraConfig(r=1, lora_alpha=16, target_modules=["0", "1"]))


def test_three_stages_through_the_hooks() -> None:
    method, model, state = RegLora(RegLoraConfig(key_fraction=0.1, weight=10)), peft_model(), {}
    factors = {name: (a, b) for name, a, b, _ in lora_layers(model)}
    view = StepView(model=model, inputs={}, step=0, micro_batches=2, share=0.5, last=True)
    method.build(model, state)
    assert method.loss(view) is None  # the first stage has no keys
    with torch.no_grad():
        factors["0"][0].copy_(A), factors["0"][1].copy_(B)
        factors["1"][0].fill_(1.0), factors["1"][1].zero_()  # a layer that did not train leaves no key
    state = method.finish(model, [])
    assert state["0"].nonzero().tolist() == [[1, 3]] and not state["1"].any()  # int(0.1 · 12) = 1; alpha/r: no part
    method.build(model, state)
    assert method.loss(view).item() == pytest.approx(10 * 8 / 2)  # |-8| at the key, over two layers
    assert method.loss(StepView(model=model, inputs={}, step=0, micro_batches=2, share=0.5, last=False)) is None
    state = method.finish(model, [])
    assert state["0"][1, 3] == 2  # the same position again


def test_neutral_weight_does_nothing() -> None:
    method, model = RegLora(RegLoraConfig(weight=0)), peft_model()
    method.build(model, {"0": torch.ones(3, 4, dtype=torch.uint8)})
    assert method.loss(StepView(model=model, inputs={}, step=0, micro_batches=1, share=1.0, last=True)) is None
    assert method.finish(model, []) == {}
