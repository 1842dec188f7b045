"""How the policy is carried on from stage to stage, and what KL is measured against."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mcit.data_prep.errors import InputError

from .adapters import Adapter, Dense, Factors, concat, live_adapter, load_adapter, lora_layers, negate, pattern, rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recipe import ModulesConfig, TrainConfig

# Where vision-language models of transformers keep what joins the tower to the language model.
PROJECTORS = {
    "multi_modal_projector",
    "merger",
    "deepstack_merger_list",
    "connector",
    "vision_projection",
    "aligner",
    "embed_vision",
}


class PastLinear(nn.Linear):
    """A linear layer that adds the frozen increments of past stages: `y = W x + bias + past_b (past_a x)`.

    It shares weight and bias with the layer it replaces. The past is neither a parameter (no optimizer, no ZeRO shard
    ever sees it) nor part of the state dict, so base weights stay bit-identical, PEFT puts a fresh adapter on top as on
    any `nn.Linear`, and TRL's reference, the model with its adapter disabled, is the previous policy.
    """

    past_a: Tensor
    past_b: Tensor

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialise (and draw random numbers)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("past_a", a.to(linear.weight), persistent=False)  # [R, in]
        self.register_buffer("past_b", b.to(linear.weight), persistent=False)  # [out, R]

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.past_a), self.past_b)


def target_names(model: "PreTrainedModel", modules: "ModulesConfig") -> list[str]:
    """Full names of the linear layers that get LoRA, from the model itself. Raises `InputError` if there are none.

    The language model's linear layers without the output head, and, where `modules` asks for them, those of the
    projector and of the vision tower.
    """
    names = {module: name for name, module in model.named_modules()}
    tower, decoder = model.get_encoder("image"), model.get_decoder()
    language = names[decoder] + "." if decoder is not model else ""
    vision = names[tower] + "." if tower is not model else None
    found: dict[str, list[str]] = {"language": [], "projector": [], "vision": []}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        if PROJECTORS & set(name.split(".")):
            found["projector"].append(name)
        elif vision is not None and name.startswith(vision):
            found["vision"].append(name)
        elif name.startswith(language):
            found["language"].append(name)
    for part, targets in found.items():
        if getattr(modules, part) == "lora" and not targets:
            raise InputError(
                f"{type(model).__name__} has no linear layers there", where="recipe", field=f"train.modules.{part}"
            )
    return [name for part, targets in found.items() if getattr(modules, part) == "lora" for name in targets]


def enter(model: "PreTrainedModel", previous: Path | None, train: "TrainConfig") -> PeftModel:
    """The model that a stage trains: the entering policy under `train.lineage`, with one trainable adapter, `default`.

    `previous` is the `adapter/` folder of the stage before (None: the base is entered). Modifies `model`. LoRA's
    initialisation draws from torch's global generator. Raises `InputError`.
    """
    past = load_adapter(previous) if previous and train.lineage != "independent" else {}
    if train.lineage == "stack":
        stack(model, past)
    elif train.lineage == "fold":
        fold(model, past)
    names = target_names(model, train.modules)
    config = LoraConfig(
        r=train.lora.r,
        lora_alpha=train.lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=train.lora.dropout,
        target_modules=pattern(names),
    )
    peft = get_peft_model(model, config)
    if train.lineage == "continue" and past:
        _resume(peft, past, previous)
    return peft


def freeze(tower: nn.Module) -> None:
    """Run `tower` without a graph if nothing in it is trained.

    With gradient checkpointing transformers asks for gradients with respect to every embedding, patches included: the
    frozen tower would be run a second time and differentiated for nothing.
    """
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = torch.no_grad()(tower.forward)  # type: ignore[method-assign]


def leave(model: PeftModel, previous: Path | None, train: "TrainConfig") -> tuple[Adapter, Adapter]:
    """(the policy on the untouched base, the increment trained in this stage), from the trained model."""
    trained = live_adapter(model)
    past = load_adapter(previous) if previous and train.lineage != "independent" else {}
    if train.lineage == "continue":
        return trained, concat([trained, negate(past)] if past else [trained])
    delta = concat([trained])
    return (concat([past, trained]) if past else delta), delta


def stack(model: "PreTrainedModel", past: Adapter) -> None:
    """Put the frozen past beside the weights of `model`, which stay as they are."""
    for name, factors in concat([past]).items():
        parent, _, leaf = name.rpartition(".")
        linear = _linear(model, name)
        if linear.weight.is_floating_point():
            setattr(model.get_submodule(parent), leaf, PastLinear(linear, factors.a, factors.b))
        else:
            _stack_beside(linear, factors, model.dtype)


def _stack_beside(linear: nn.Linear, factors: Factors, dtype: torch.dtype) -> None:
    """The same for a layer whose weight is quantised, so that only it knows how to multiply with it."""
    device = linear.weight.device
    linear.register_buffer("past_a", factors.a.to(device, dtype), persistent=False)  # [R, in]
    linear.register_buffer("past_b", factors.b.to(device, dtype), persistent=False)  # [out, R]

    def add_past(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        past_a, past_b = module.get_buffer("past_a"), module.get_buffer("past_b")
        return output + F.linear(F.linear(args[0].to(dtype), past_a), past_b).to(output.dtype)

    linear.register_forward_hook(add_past)


@torch.no_grad()
def fold(model: nn.Module, past: Mapping[str, Factors | Dense]) -> None:
    """Add the past to the weights: in float32 from the untouched base, rounded to the model's dtype once."""
    for name, factors in past.items():
        weight = _linear(model, name).weight
        weight.copy_((weight.float() + factors.delta().to(weight.device)).to(weight.dtype))


def set_reference(model: PeftModel, previous: Path | None, train: "TrainConfig") -> None:
    """Make TRL's reference pass see `train.reference`. Call it when `GRPOTrainer` is built and `beta` is not 0.

    TRL has by then copied the entering adapter to one named `ref`, and runs its reference pass with `ref` active, or,
    without such an adapter, with all adapters disabled. That copy is the previous policy. Disabled, the model is the
    base under `continue` and `independent`; under `stack` and `fold` the past stays in, so there `ref` takes it out.
    """
    if train.reference == "previous" and train.lineage == "continue" and previous:
        return
    if "ref" in model.peft_config:
        model.delete_adapter("ref")
    if train.reference == "base" and train.lineage in ("stack", "fold") and previous:
        undo = concat([negate(load_adapter(previous))])
        config = LoraConfig(r=rank(undo), lora_alpha=rank(undo), target_modules=pattern(undo))
        model.add_adapter("ref", config)
        _fill(model, undo, "ref")


def _resume(model: PeftModel, past: Adapter, previous: Path | None) -> None:
    """Fill the fresh adapter with the previous one."""
    fresh = {name for name, *_ in lora_layers(model)}
    wanted = next(a.shape[0] for _, a, _, _ in lora_layers(model))
    if rank(past) != wanted:
        raise InputError(
            f"lineage continue trains the same adapter on, and {previous} has rank {rank(past)}",
            where="recipe",
            field="train.lora.r",
            remedy=f"Set it to {rank(past)}",
        )
    if fresh != set(past):
        raise InputError(
            f"lineage continue trains the same adapter on, and {previous} covers other layers: "
            f"{_some(fresh ^ set(past))}",
            where="recipe",
            field="train.modules",
        )
    _fill(model, past, "default")


@torch.no_grad()
def _fill(model: PeftModel, adapter: Adapter, name: str) -> None:
    for module, a, b, scaling in lora_layers(model, name):
        a.copy_(adapter[module].a)
        b.copy_(adapter[module].b * (adapter[module].scaling / scaling))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise InputError("the entering adapter has a layer that the base model lacks", where=name)
    return module


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
