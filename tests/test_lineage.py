"""Each lineage: what is trained, that its adapters on the base are the policy, what TRL takes for reference."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import save_qwen3_vl_moe
from peft import PeftModel
from torch import nn
from training import random_adapter, tiny_model
from transformers import AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from mcit.data_prep.errors import InputError
from mcit.eval.lora import fold, load_adapter
from mcit.pipeline.policy.adapters import concat, lora_layers, rank, save_adapter
from mcit.pipeline.policy.lineage import PastLinear, enter, freeze, leave, stack, target_names
from mcit.pipeline.recipe.schema import ModulesConfig, TrainConfig
from mcit.pipeline.reinforcement.references import References
from mcit.pipeline.training.arguments import check_modules, check_reference
from mcit.pipeline.training.parameters import evaluating

IDS = torch.tensor([[10, 20, 30, 40, 50]])
Q, UP = "model.language_model.layers.1.self_attn.q_proj", "model.language_model.layers.4.mlp.up_proj"


def config(lineage: str, **settings: object) -> TrainConfig:
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.0}
    return TrainConfig.model_validate({"lineage": lineage, "lora": lora, **settings})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train(model: PeftModel, seed: int) -> None:
    """Stands for training: move every factor of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, a, b, _ in lora_layers(model):
            a.add_(0.1 * torch.randn(a.shape, generator=generator))
            b.add_(0.1 * torch.randn(b.shape, generator=generator))


def stages(lineage: str, folder: Path, n: int = 2, **settings: object) -> list[torch.Tensor]:
    """Run `n` stages, saving `<k>/adapter` and `<k>/delta`; the training-time logits at the end of each."""
    outputs, previous = [], None
    for k in range(1, n + 1):
        model = enter(tiny_model(), previous, config(lineage, **settings))
        train(model, seed=k)
        outputs.append(logits(model))
        policy, delta = leave(model, previous, config(lineage, **settings))
        previous = folder / str(k) / "adapter"
        save_adapter(previous, policy, "base")
        save_adapter(folder / str(k) / "delta", delta, "base")
    return outputs


@pytest.mark.parametrize("lineage", ["stack", "fold", "continue", "independent"])
def test_adapter_on_the_untouched_base_is_the_policy(tmp_path, lineage: str) -> None:
    """Three stages; `adapter/` gives the training-time logits, and the deltas add up to it."""
    for k, trained in enumerate(stages(lineage, tmp_path, 3), 1):
        served = PeftModel.from_pretrained(tiny_model(), tmp_path / str(k) / "adapter")
        torch.testing.assert_close(logits(served), trained, rtol=0, atol=1e-4)
        parts = [load_adapter(tmp_path / str(i) / "delta") for i in range(k if lineage == "independent" else 1, k + 1)]
        total, policy = concat(parts), load_adapter(tmp_path / str(k) / "adapter")
        for name, factors in policy.items():
            torch.testing.assert_close(total[name].delta(), factors.delta(), rtol=0, atol=1e-5)
    assert rank(policy) == {"stack": 12, "fold": 12, "continue": 4, "independent": 4}[lineage]


def test_stack_leaves_base_and_optimizer_alone(tmp_path) -> None:
    stages("stack", tmp_path, 1)
    untouched = {name: tensor.clone() for name, tensor in tiny_model().state_dict().items()}
    model = tiny_model()
    peft = enter(model, tmp_path / "1" / "adapter", config("stack"))
    assert sum(isinstance(module, PastLinear) for module in model.modules()) == 35  # 5 layers × 7
    trained = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trained and all(re.search(r"language_model.*\.lora_[AB]\.default\.weight$", name) for name in trained)

    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        peft(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    state = {
        re.sub(r"^base_model\.model\.|\.base_layer", "", name): tensor
        for name, tensor in peft.state_dict().items()
        if "lora_" not in name
    }
    assert state.keys() == untouched.keys()  # the past is no part of it either
    assert all(torch.equal(state[name], tensor) for name, tensor in untouched.items())
    past = load_adapter(tmp_path / "1" / "adapter")
    wrapped = peft.get_base_model().get_submodule(Q).base_layer
    assert torch.equal(wrapped.past_a, past[Q].a) and torch.equal(wrapped.past_b, past[Q].b)


def test_stack_draws_no_random_number() -> None:
    model, adapter = tiny_model(), random_adapter(tiny_model(), [Q, UP], 2, seed=0)
    state = torch.get_rng_state()
    stack(model, adapter)
    assert torch.equal(torch.get_rng_state(), state)


def test_stacked_linear_by_hand() -> None:
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
    past = PastLinear(linear, torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [3.0]]))
    # x = [1, 2]: W x + bias = [11, 22], past_a x = 3, past_b 3 = [6, 9]
    assert past(torch.tensor([1.0, 2.0])).tolist() == [17.0, 31.0]
    assert past.weight is linear.weight and past.bias is linear.bias
    assert set(past.state_dict()) == {"weight", "bias"}


def test_fold_adds_in_float32_and_rounds_once() -> None:
    """Increments too small for bfloat16 one by one are kept when they come together."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    small = concat([{"0": random_adapter(model, ["0"], 1, seed=0)["0"]._replace(a=torch.ones(1, 1), b=b)} for b in
                    [torch.full((1, 1), 2.0**-9)] * 8])  # fmt: skip
    fold(model, small)
    assert model[0].weight.item() == 1 + 2.0**-6  # one by one, each 1 + 2^-9 would have rounded back to 1


def test_stages_start_from_different_factors(tmp_path) -> None:
    torch.manual_seed(1)
    first = {name: a.clone() for name, a, _, _ in lora_layers(enter(tiny_model(), None, config("stack")))}
    torch.manual_seed(2)
    second = {name: a for name, a, _, _ in lora_layers(enter(tiny_model(), None, config("stack")))}
    assert not torch.equal(first[Q], second[Q])


@pytest.mark.parametrize("lineage", ["stack", "fold", "continue", "independent"])
def test_reference_policies(tmp_path, lineage: str) -> None:
    """Both references after training, against the entering policy and the base; then the policy is active again."""
    previous_logits = stages(lineage, tmp_path, 1)[0]
    base_logits = logits(tiny_model())
    settings = config(lineage)
    previous = tmp_path / "1" / "adapter"
    model = enter(tiny_model(), previous, settings)
    entering = logits(model)
    references = References(SimpleNamespace(model=model, previous=previous, stage=SimpleNamespace(train=settings)))
    assert references.names == (["base"] if lineage == "independent" else ["base", "previous"])
    train(model, seed=7)
    policy = logits(model)
    seen = {}
    for name in ("base", "previous"):
        with references.under(name) as under:
            seen[name] = logits(under)
    assert not torch.allclose(policy, entering, atol=1e-3) and torch.equal(policy, logits(model))
    if lineage == "independent":
        torch.testing.assert_close(entering, base_logits)
    else:
        torch.testing.assert_close(entering, previous_logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["previous"], entering, rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["base"], base_logits, rtol=0, atol=1e-4)
    if lineage != "fold":
        assert torch.equal(seen["base"], base_logits)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(".default." in name for name in trainable)


def test_another_adapter_than_the_trained_one_is_refused() -> None:
    """TRL would take it for its reference, or fail with a KeyError."""
    settings = config("stack")
    model = enter(tiny_model(), None, settings)
    model.add_adapter("ref", model.peft_config["default"])
    with pytest.raises(RuntimeError, match="trains one adapter, `default`, and the model has default, ref"):
        References(SimpleNamespace(model=model, previous=None, stage=SimpleNamespace(train=settings)))


@pytest.mark.parametrize(("vision", "projector"), [("frozen", "frozen"), ("full", "frozen"), ("frozen", "full")])
def test_full_trains_the_weights_that_are_not_frozen(vision: str, projector: str) -> None:
    model = tiny_model().to(torch.bfloat16)
    modules = {"language": "full", "vision": vision, "projector": projector}
    assert enter(model, None, config("full", modules=modules)) is model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tower = {name for name, _ in model.named_parameters() if ".visual." in name}
    merger = {name for name in tower if ".merger." in name}
    assert len(tower) > len(merger) > 0
    assert tower & trained == (tower - merger if vision == "full" else merger if projector == "full" else set())
    assert {name for name, _ in model.named_parameters()} - tower <= trained  # embeddings and head among them
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_projector_is_aligned_alone() -> None:
    model = enter(tiny_model(), None, config("full", modules={"language": "frozen", "projector": "full"}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".merger." in name} != set()
    with pytest.raises(InputError, match=r"train.modules: leave nothing to train. Set one of language, projector, vis"):
        check_modules(config("full", modules={"language": "frozen"}))


def test_full_refuses_a_mixture_of_experts(tmp_path) -> None:
    save_qwen3_vl_moe(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"train.lineage: does not train mixtures of experts"):
        enter(model, None, config("full", modules={"language": "full"}))


@pytest.mark.parametrize(
    ("lineage", "part", "how"), [("full", "language", "lora"), ("full", "vision", "lora"), ("stack", "vision", "full")]
)
def test_adapters_and_weights_are_not_trained_under_each_others_lineage(lineage: str, part: str, how: str) -> None:
    good = "full" if lineage == "full" else "lora"
    check_modules(config(lineage, modules={"language": good}))
    with pytest.raises(InputError, match=f"train.modules.{part}: is `{how}`, and lineage {lineage} trains {good}"):
        check_modules(config(lineage, modules={"language": good, part: how}))


@pytest.mark.parametrize(
    ("reference", "beta", "fine"),
    [("previous", 0.04, True), ("base", 0.04, True), ("none", None, True), ("none", 0, True), ("none", 0.04, False),
     ("previous", 0, False), ("previous", None, False)],
)  # fmt: skip
def test_reference_and_beta_must_agree(reference: str, beta: float | None, fine: bool) -> None:
    args = {} if beta is None else {"beta": beta}
    settings = config("stack", paradigm="rft", reference=reference, rft={"args": args})
    if fine:
        check_reference(settings)
    else:
        with pytest.raises(InputError, match=r"train.rft.args.beta: train.reference is"):
            check_reference(settings)
    check_reference(config("stack", reference=reference))  # supervised tuning has no KL


def test_target_names_come_from_the_model() -> None:
    model = tiny_model()
    language = target_names(model, ModulesConfig())
    assert len(language) == 35 and all(name.startswith("model.language_model.layers.") for name in language)
    merger = target_names(model, ModulesConfig(projector="lora"))
    assert set(merger) - set(language) == {"model.visual.merger.mlp.0", "model.visual.merger.mlp.2"}
    tower = set(target_names(model, ModulesConfig(vision="lora"))) - set(language)
    assert "model.visual.blocks.0.attn.qkv" in tower and not any("merger" in name for name in tower)
    assert not any("lm_head" in name or "patch_embed" in name for name in (*language, *merger, *tower))


def test_gradients_in_evaluation_mode_checkpoint_as_training_does() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.train()
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]
    with evaluating(model):
        assert not any(one.training for one in model.modules())
    with evaluating(model, gradients=True):
        assert layers and [one for one in model.modules() if one.training] == layers
    assert all(one.training for one in model.modules())


@pytest.mark.parametrize("modules, runs", [({}, 1), ({"vision": "lora"}, 2)])
def test_checkpointing_does_not_rerun_a_frozen_tower(modules: dict[str, str], runs: int) -> None:
    """Gradient checkpointing as TRL turns it on; a tower that is trained is run again in the backward pass."""
    model = enter(tiny_model(), None, config("stack", modules=modules))
    freeze(model.get_base_model().get_encoder("image"))
    calls: list[torch.Tensor] = []
    tower: Any = model.get_encoder("image")
    tower.blocks[1].register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    image = model.config.image_token_id
    ids = torch.tensor([[10, 20, *4 * [image], 30, 40]])
    pixels = torch.rand((16, 3 * 2 * 8 * 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == image).int(), "labels": ids}
    model(**inputs, pixel_values=pixels, image_grid_thw=torch.tensor([[1, 4, 4]])).loss.backward()
    assert len(calls) == runs
    assert calls[0].requires_grad == bool(modules)
    assert all(b.grad.abs().sum() > 0 for name, _, b, _ in lora_layers(model) if name.endswith("v_proj"))


def test_continue_refuses_another_shape(tmp_path) -> None:
    stages("continue", tmp_path, 1)
    with pytest.raises(InputError, match=r"train.lora.r: .* has rank 4. Set it to 4"):
        enter(tiny_model(), tmp_path / "1" / "adapter", config("continue", lora={"r": 2, "alpha": 8.0, "dropout": 0.0}))
    with pytest.raises(InputError, match=r"train.modules: .* covers other layers: model.visual.merger.mlp.0"):
        enter(tiny_model(), tmp_path / "1" / "adapter", config("continue", modules={"projector": "lora"}))


def test_continue_keeps_the_policy_when_alpha_changes(tmp_path) -> None:
    trained = stages("continue", tmp_path, 1)[0]
    model = enter(
        tiny_model(), tmp_path / "1" / "adapter", config("continue", lora={"r": 4, "alpha": 2.0, "dropout": 0.0})
    )
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"model.layers.0.q: does not fit the base model: it has no such linear layer"):
        stack(tiny_model(), {"model.layers.0.q": random_adapter(tiny_model(), [Q], 2, seed=0)[Q]})
