"""EWC, MAS and L2 against numbers worked out by hand, and against gradients taken sample by sample."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mcit.pipeline.methods import StepView
from mcit.pipeline.methods.ewc import Ewc, EwcConfig
from mcit.pipeline.methods.importance import distance, keep_largest
from mcit.pipeline.methods.l2 import L2, L2Config, squared_norm
from mcit.pipeline.methods.mas import Mas, MasConfig
from mcit.pipeline.policy.adapters import lora_layers

IGNORED = -100
BEFORE = SimpleNamespace(kind="adapter")  # how the stage before is served


def tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_distance_by_hand() -> None:
    """2 · (3 − 1)² + 0 · (5 − 9)² = 8, and 1 · (1 − 0)² = 1; the gradient is 2 Ω (θ − θ*)."""
    weights = {"a": tensor(3, 5).requires_grad_(), "b": tensor(1).requires_grad_(), "c": tensor(7)}
    term = distance(weights, {"a": (tensor(2, 0), tensor(1, 9)), "b": (tensor(1), tensor(0))})
    term.backward()
    assert term.item() == 9
    assert weights["a"].grad.tolist() == [8, 0] and weights["b"].grad.tolist() == [2]


def test_only_the_most_important_share_is_kept() -> None:
    omega = tensor([5, 1, 3], [2, 4, 0])
    keep_largest(omega, 0.34)  # of six, two
    assert omega.tolist() == [[5, 0, 0], [0, 4, 0]]
    keep_largest(omega, 1.0)
    assert omega.tolist() == [[5, 0, 0], [0, 4, 0]]


@pytest.fixture
def head() -> nn.Linear:
    """Three tokens of two units: logits are h₁, h₂ and 0."""
    made = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        made.weight.copy_(tensor([1, 0], [0, 1], [0, 0]))
    return made


def test_ewc_asks_for_the_log_probability_of_the_whole_answer(head: nn.Linear) -> None:
    """All logits 0: each of the two answer tokens has probability 1/3; ∂(−log p)/∂logits = p − onehot."""
    method = Ewc(EwcConfig())
    method.head = head
    hidden, labels = torch.zeros(4, 2, requires_grad=True), torch.tensor([IGNORED, IGNORED, 0, 2])
    value = method.of(hidden, labels)
    value.backward()
    assert value.item() == pytest.approx(2 * torch.log(torch.tensor(3.0)).item())
    torch.testing.assert_close(hidden.grad, tensor([0, 0], [1 / 3 - 1, 1 / 3], [1 / 3, 1 / 3], [0, 0]))
    assert method.importance(tensor(-2, 3)).tolist() == [4, 9]


def test_mas_asks_for_the_squared_norm_of_the_outputs_and_no_label(head: nn.Linear) -> None:
    """Tokens 1 and 2 predict the answer: (3² + 4² + 1² + 0²) / 2 = 13; which tokens the answer has does not matter."""
    method = Mas(MasConfig())
    method.head = head
    hidden = tensor([9, 9], [3, 4], [1, 0], [9, 9]).requires_grad_()
    values = [method.of(hidden, torch.tensor([IGNORED, IGNORED, *answer])) for answer in ((0, 2), (1, 1))]
    assert [value.item() for value in values] == [13, 13]
    [gradient] = torch.autograd.grad(values[0], hidden)
    assert gradient.tolist() == [[0, 0], [3, 4], [1, 0], [0, 0]]
    assert method.importance(tensor(-2, 3)).tolist() == [2, 3]


class Trainer:
    """What `Importance` asks of a trainer, with gradients made up: sample i's are those in `made[i]`."""

    def __init__(self, model: nn.Module, made: dict[int, Tensor]):
        self.model, self.made = model, made
        self.accelerator = SimpleNamespace(reduce=lambda value, how: value)

    def output_head(self, name: str) -> None:
        return None

    def gradients(self, indices: list[int], of: Any) -> Any:
        return ({"weight": self.made[index]} for index in indices)


def sample(name: str) -> Any:
    return {"task": "t", "id": name}


def view(model: Any, last: bool = True) -> StepView:
    return StepView(model, {}, replayed=0, step=0, micro_batches=2, share=0.5, last=last, process=0, processes=1)


def test_ewc_through_the_hooks_of_three_stages() -> None:
    """Importance is the mean of squares, and past importance fades by `decay`."""
    model = nn.Linear(2, 1, bias=False)
    method = Ewc(EwcConfig(weight=10, decay=0.5))
    trainer: Any = Trainer(model, {0: tensor([1, 2]), 1: tensor([3, 0])})
    entered: Any = SimpleNamespace(model=model)

    def stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
        method.build(model, state)
        method.begin(entered, trainer)
        return method.finish(model, [sample("x"), sample("y")])

    state = stage({})
    assert method.loss(view(model)) is None  # the first stage has no past
    assert state["weight"].tolist() == [[5, 2]]  # (1 + 9) / 2, (4 + 0) / 2
    with torch.no_grad():
        model.weight.copy_(tensor([1, 1]))
    method.build(model, state)
    method.begin(entered, trainer)
    with torch.no_grad():
        model.weight.copy_(tensor([2, 4]))
    assert method.loss(view(model)).item() == 10 / 2 * (5 * 1 + 2 * 9)
    assert method.loss(view(model, last=False)) is None
    second = Ewc(EwcConfig(weight=10, decay=0.5))  # of a second phase: the stage began where the first began
    second.build(model, method.hand_over())
    second.begin(entered, trainer)
    assert second.loss(view(model)).item() == 10 / 2 * (5 * 1 + 2 * 9)
    assert second.finish(model, [sample("x"), sample("y")])["weight"].tolist() == [[7.5, 3]]
    assert method.finish(model, [sample("x"), sample("y")])["weight"].tolist() == [[7.5, 3]]


def test_what_another_method_freezes_keeps_its_importance() -> None:
    """HFT draws another half in every stage."""
    model = nn.Linear(2, 1, bias=False)
    method = Ewc(EwcConfig(weight=10))
    method.build(model, {"frozen": tensor([3, 4])})
    method.begin(SimpleNamespace(model=model), Trainer(model, {0: tensor([1, 2])}))
    state = method.finish(model, [sample("x")])
    assert state["frozen"].tolist() == [[3, 4]] and state["weight"].tolist() == [[1, 4]]


def test_importance_as_mllm_ctbench_scales_it() -> None:
    model = nn.Linear(2, 1, bias=False)
    method = Mas(MasConfig(normalise=True, share=0.5))
    trainer: Any = Trainer(model, {0: tensor([1, -3])})
    method.build(model, {})
    method.begin(SimpleNamespace(model=model), trainer)  # type: ignore[arg-type]
    assert method.finish(model, [sample("x")])["weight"].tolist() == [[0, 1.5]]  # mean 2; of two, the larger


def adapted() -> Any:
    base = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    base.config = SimpleNamespace(model_type="none", tie_word_embeddings=False)
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))


def test_squared_norm_is_that_of_the_product() -> None:
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    torch.testing.assert_close(squared_norm(a, b, 2.0), (2 * b @ a).square().sum())


@pytest.mark.parametrize("lineage", ["stack", "continue"])
def test_l2_is_the_distance_of_the_weights(lineage: str) -> None:
    """Under `continue` from the adapter that was entered; under `stack` that is the frozen past, and B is zero."""
    model = adapted()
    generator = torch.Generator().manual_seed(0)

    def shake() -> dict[str, Tensor]:
        with torch.no_grad():
            for _, a, b, _ in lora_layers(model):
                a.normal_(generator=generator), b.normal_(generator=generator)
            return {name: scaling * b @ a for name, a, b, scaling in lora_layers(model)}

    start = shake() if lineage == "continue" else {"0": 0, "1": 0}
    method = L2(L2Config(weight=3))
    method.build(model, {})
    entered: Any = SimpleNamespace(
        model=model, before=BEFORE, stage=SimpleNamespace(train=SimpleNamespace(lineage=lineage))
    )
    method.begin(entered, None)  # type: ignore[arg-type]
    if lineage == "continue":
        assert method.loss(view(model)).item() == 0
    factors = [factor for _, a, b, _ in lora_layers(model) for factor in (a, b)]
    shake()
    now = {name: scaling * b @ a for name, a, b, scaling in lora_layers(model)}
    expected = 3 / 2 * sum((now[name] - start[name]).square().sum() for name in now)
    ours = method.loss(view(model))
    torch.testing.assert_close(ours, expected)
    second = L2(L2Config(weight=3))  # of a second phase: the stage began where the first began
    second.build(model, method.hand_over())
    second.begin(entered, None)  # type: ignore[arg-type]
    torch.testing.assert_close(second.loss(view(model)), expected)
    for mine, theirs in zip(torch.autograd.grad(ours, factors), torch.autograd.grad(expected, factors), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_l2_of_weights_that_are_trained_themselves_by_hand() -> None:
    """From (1, 2) to (4, 0): 3/2 · (9 + 4); a frozen weight has no say."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].requires_grad_(False)
    method = L2(L2Config(weight=3))
    method.build(model, {})
    stage = SimpleNamespace(train=SimpleNamespace(lineage="full"))
    with torch.no_grad():
        model[0].weight.copy_(tensor([1, 2]))
        method.begin(SimpleNamespace(model=model, before=BEFORE, stage=stage), None)  # type: ignore[arg-type]
        for layer, row in zip(model, ([4, 0], [7]), strict=True):
            layer.weight.copy_(tensor(row))
    ours: Any = method.loss(view(model))
    ours.backward()
    assert ours.item() == 19.5 and model[0].weight.grad.tolist() == [[9, -6]]


def test_l2_leaves_the_first_stage_alone() -> None:
    method, model = L2(L2Config()), adapted()
    stage = SimpleNamespace(train=SimpleNamespace(lineage="continue"))
    method.begin(SimpleNamespace(model=model, before=SimpleNamespace(kind="base"), stage=stage), None)  # type: ignore[arg-type]
    assert method.loss(view(model)) is None
