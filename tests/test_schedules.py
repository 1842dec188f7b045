"""Refresh learning, FPF and modality interference: formulas by hand, and what they do to a model."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from training import make_samples, tiny_model, tiny_processor, write_images

from mcit.pipeline.methods.fpf import Fpf, FpfConfig, most_moved
from mcit.pipeline.methods.interference import Interference, InterferenceConfig, perturbed
from mcit.pipeline.methods.outputs import answer_loss
from mcit.pipeline.methods.previous import swapped
from mcit.pipeline.methods.refresh import RefreshConfig, ascent
from mcit.pipeline.training.collator import Collator
from mcit.pipeline.training.replay import Replayed, backbone


def tensor(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_ascent_by_hand() -> None:
    """‖θ‖ = 5 and ‖g‖ = 0.5, so the gradient counts ten times; noise on top; an important weight moves half as far."""
    config = RefreshConfig(step=0.1, damping=1.0, noise=2.0)
    moved = ascent(tensor(3, 4), tensor(0.3, -0.4), tensor(0, 1), tensor(1, 1), config)
    torch.testing.assert_close(moved, tensor(0.1 * (3 + 2), 0.1 * (-4 + 2) / 2))


def test_only_the_gradients_direction_counts() -> None:
    config = RefreshConfig(step=0.1, noise=0)
    small, large = (
        ascent(tensor(3, 4), scale * tensor(1, 2), torch.zeros(()), tensor(0, 0), config) for scale in (1, 9)
    )
    torch.testing.assert_close(small, large)
    assert not ascent(tensor(0, 0), tensor(1, 2), torch.zeros(()), tensor(0, 0), config).any()  # as B of a fresh LoRA
    assert not ascent(tensor(3, 4), tensor(0, 0), torch.zeros(()), tensor(0, 0), config).any()


def test_the_layers_that_moved_most_are_chosen_whole() -> None:
    """Per weight: a large layer that moved little everywhere is not first; the one that fills the share is the last."""
    weights = {
        "x.lora_A.default.weight": tensor(1, 1),
        "x.lora_B.default.weight": tensor(0, 0),
        "y.lora_A.default.weight": tensor(3, 0),
        "y.lora_B.default.weight": tensor(0, 0),
        "z.lora_A.default.weight": torch.full((8,), 0.7),
        "z.lora_B.default.weight": torch.full((8,), 0.7),
    }
    start = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    # mean movement: x 0.5, y 0.75, z 0.7, of 4, 4 and 16 weights
    assert most_moved(weights, start, 0.1) == ["y.lora_A.default.weight", "y.lora_B.default.weight"]
    assert [name[0] for name in most_moved(weights, start, 0.2)] == ["y", "y", "z", "z"]
    assert len(most_moved(weights, start, 1.0)) == 6


@pytest.mark.parametrize(("times", "due"), [(1, {10}), (2, {5, 10}), (4, {2, 5, 8, 10})])
def test_fpf_comes_at_the_end_and_k_fpf_evenly_before_it(times: int, due: set[int]) -> None:
    method = Fpf(FpfConfig(times=times))
    method.data(SimpleNamespace(seed=0), [], {1: make_samples("past", 3)}, {})  # type: ignore[arg-type]
    [callback] = method.callbacks()
    seen = []
    for step in range(1, 11):
        method.revise = lambda step=step: seen.append(step)  # type: ignore[method-assign]
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=10), None)  # type: ignore[arg-type]
    assert set(seen) == due and len(seen) == times


def test_fpf_leaves_a_first_stage_alone() -> None:
    method = Fpf(FpfConfig())
    method.data(SimpleNamespace(seed=0), make_samples("new", 3), {}, {})  # type: ignore[arg-type]
    assert method.callbacks() == [] and method.replay([]) is None


def test_other_weights_in_place_and_back_again() -> None:
    """A graph that was made before is still right afterwards."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(tensor([1, 2]))
    loss = model(tensor([3, 4])).square().sum()
    with swapped(model, {"weight": tensor([10, 20])}), torch.no_grad():
        assert model(tensor([3, 4])).item() == 110
    assert model(tensor([3, 4])).item() == 11
    loss.backward()
    assert model.weight.grad.tolist() == [[2 * 11 * 3, 2 * 11 * 4]]


def test_samples_are_perturbed_from_the_other_modality() -> None:
    mixed = make_samples("pictures", 4) + make_samples("text", 4, images=0)
    for before, after in zip(mixed, perturbed(mixed, "noise.png", 0), strict=True):
        assert after["completion"] == before["completion"] and after["id"] == before["id"]
        question, asked = (sample["prompt"][0]["content"] for sample in (before, after))
        if before["images"]:
            assert after["images"] == before["images"] and asked.endswith(f"\n{question}") and asked != question
        else:
            assert asked == question and after["images"][0] in {path for one in mixed for path in one["images"]}
    assert perturbed(mixed, "noise.png", 0) == perturbed(mixed, "noise.png", 0) != perturbed(mixed, "noise.png", 1)
    [alone] = perturbed(make_samples("text", 1, images=0), "noise.png", 0)
    assert alone["images"] == ["noise.png"]


def test_a_perturbation_that_changes_nothing_costs_its_labels_alone(tmp_path: Any, monkeypatch: Any) -> None:
    """Then the model's prediction is its own target: the divergence is 0, and only the cross-entropy is left."""
    write_images(tmp_path)
    samples = make_samples("t", 3)
    for sample in samples:
        sample["images"] = [str(tmp_path / path) for path in sample["images"]]
    model, collator = tiny_model(), Collator(tiny_processor(), [], 512)
    method = Interference(InterferenceConfig(per_batch=3, weight=5))
    method.head, method.samples = model.get_output_embeddings(), samples
    method.trainer = SimpleNamespace(  # type: ignore[assignment]
        model=model,
        collator=collator,
        _prepare_input=lambda inputs: inputs,
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
    )

    def losses(shown: list[Any]) -> tuple[Tensor, Tensor]:
        batch = collator.collate(shown)
        labels, tokens = batch.pop("labels"), batch["attention_mask"].sum(1).tolist()
        hidden = backbone(model)(**batch, use_cache=False).last_hidden_state
        plain = torch.stack(
            [answer_loss(h[:n], row[:n], method.head) for h, row, n in zip(hidden, labels, tokens, strict=True)]
        )
        return method.replay_loss(Replayed([0, 1, 2], tokens, hidden, labels)), plain

    same, plain = losses(samples)
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=1e-5)
    other, plain = losses(perturbed(samples, "", 0))
    assert (other > plain + 1e-6).all()
