"""How the policy is carried on from stage to stage: as LoRA on the untouched base, or as a whole model (`full`)."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from mcit.data_prep.errors import InputError
from mcit.eval.lora import Adapter, Factors, fold, linear_layer, load_adapter
from mcit.eval.serving import save_processor

from .adapters import concat, live_adapter, lora_layers, negate, pattern, rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..recipe.schema import ModulesConfig, TrainConfig

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
    past = True  # False: the base's own layer

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialise (and draw random numbers)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("past_a", a.to(linear.weight), persistent=False)  # [R, in]
        self.register_buffer("past_b", b.to(linear.weight), persistent=False)  # [out, R]

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output + F.linear(F.linear(input, self.past_a), self.past_b) if self.past else output


def target_names(model: "PreTrainedModel", modules: "ModulesConfig") -> list[str]:
    """Full names of the linear layers that get LoRA, from the model itself. Raises `InputError` if there are none.

    The language model's linear layers without the output head, and, where `modules` asks for them, those of the
    projector and of the vision tower.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    found = by_part(model, linear)
    for part, targets in found.items():
        if getattr(modules, part) == "lora" and not targets:
            raise InputError(
                f"{type(model).__name__} has no linear layers there", where="recipe", field=f"train.modules.{part}"
            )
    return [name for part, targets in found.items() if getattr(modules, part) == "lora" for name in targets]


def by_part(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, list[str]]:
    """Names of modules or parameters of a model by what they are part of: `language`, `projector` or `vision`."""
    modules = {module: name for name, module in model.named_modules()}
    tower, decoder = model.get_encoder("image"), model.get_decoder()
    language = modules[decoder] + "." if decoder is not model else ""
    vision = modules[tower] + "." if tower is not model else None
    found: dict[str, list[str]] = {"language": [], "projector": [], "vision": []}
    for name in names:
        if PROJECTORS & set(name.split(".")):
            found["projector"].append(name)
        elif vision is not None and name.startswith(vision):
            found["vision"].append(name)
        elif name.startswith(language):
            found["language"].append(name)
    return found


def enter(model: "PreTrainedModel", previous: Path | None, train: "TrainConfig") -> "PeftModel | PreTrainedModel":
    """The model that a stage trains: the entering policy under `train.lineage`, with one trainable adapter, `default`.

    `previous` is the `adapter/` folder of the stage before (None: `model` is what is entered). Modifies `model`. LoRA's
    initialisation draws from torch's global generator. Under lineage `full` no adapter is added: the weights of `model`
    are trained themselves. Raises `InputError`.
    """
    past = load_past(previous, train)
    if train.lineage == "full":
        fold(model, past)
        return train_whole(model, train.modules)
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
        resume(peft, past, previous)
    return peft


def load_past(previous: Path | None, train: "TrainConfig") -> Adapter:
    """What the stages before have added to the base, as a LoRA: nothing if they left none, or none of it is entered."""
    return load_adapter(previous) if previous and train.lineage != "independent" else {}


def train_whole(model: "PreTrainedModel", modules: "ModulesConfig") -> "PreTrainedModel":
    """Train the weights themselves, of those parts that are not `frozen`.

    All weights become float32, whatever they are stored in: steps of 1e-6 would vanish in bfloat16. (DeepSpeed keeps
    float32 of its own, and casts the model back.) Raises `InputError` for a mixture of experts: transformers writes it
    in another layout than it is published and served in.
    """
    if any(parameter.ndim == 3 for parameter in model.get_decoder().parameters()):
        remedy = "Train a LoRA, or experts of a task's own (method: {moextend: {}})"
        raise InputError("does not train mixtures of experts", where="recipe", field="train.lineage", remedy=remedy)
    model.float().requires_grad_(False)
    for _, parameter in whole_parameters(model, modules):
        parameter.requires_grad_(True)
    return model


def whole_parameters(model: "PreTrainedModel", modules: "ModulesConfig") -> list[tuple[str, nn.Parameter]]:
    """The parameters that lineage `full` trains, by name."""
    parts = by_part(model, [name for name, _ in model.named_parameters()])
    part = {name: part for part in ("projector", "vision") for name in parts[part]}  # the rest goes with the language
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if getattr(modules, part.get(name, "language")) != "frozen"
    ]


def save_whole(model: "PreTrainedModel", processor: Any, dtype: str, loaded: tuple[Any, Any], folder: Path) -> None:
    """Write the policy of lineage `full`, rounded to `dtype` once; `loaded` is its configuration and generation's.

    Trainers write into both. The next stage enters what was written here, which is what is evaluated.
    """
    model.config, model.generation_config = loaded
    model.to(getattr(torch, dtype)).save_pretrained(folder)  # type: ignore[arg-type]
    save_processor(processor, folder)


def freeze(tower: nn.Module) -> None:
    """Run `tower` without a graph if nothing in it is trained.

    With gradient checkpointing transformers asks for gradients with respect to every embedding, patches included: the
    frozen tower would be run a second time and differentiated for nothing.
    """
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.forward = torch.no_grad()(tower.forward)  # type: ignore[method-assign]


def leave(model: PeftModel, previous: Path | None, train: "TrainConfig") -> tuple[Adapter, Adapter]:
    """(the policy on the untouched base, the increment trained in this stage), from the trained model."""
    past = load_past(previous, train)
    trained = live_adapter(model)
    if train.lineage == "continue":
        return trained, concat([trained, negate(past)] if past else [trained])
    return policy(model, past, train), concat([trained])


def policy(model: PeftModel, past: Adapter, train: "TrainConfig") -> Adapter:
    """The policy as it is now, on the untouched base; `past` is `load_past`'s."""
    trained = live_adapter(model)
    return trained if train.lineage == "continue" else concat([past, trained] if past else [trained])


def stack(model: "PreTrainedModel", past: Adapter) -> None:
    """Put the frozen past beside the weights of `model`, which stay as they are."""
    for name, factors in concat([past]).items():
        parent, _, leaf = name.rpartition(".")
        linear = linear_layer(model, name)
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


@contextlib.contextmanager
def without_past(model: nn.Module) -> Iterator[None]:
    """Inside, what `stack` put beside the weights of `model` does not count: its layers are the base's, to the bit."""
    layers = [module for module in model.modules() if isinstance(module, PastLinear)]
    for layer in layers:
        layer.past = False
    try:
        yield
    finally:
        for layer in layers:
            layer.past = True


def add_frozen(model: PeftModel, adapter: Adapter, name: str) -> None:
    """Put `adapter` on the model under `name`, neither active nor trained."""
    config = LoraConfig(r=rank(adapter), lora_alpha=rank(adapter), target_modules=pattern(adapter))
    model.add_adapter(name, config)
    _fill(model, adapter, name)


def resume(model: PeftModel, past: Adapter, previous: Path | None) -> None:
    """Fill the fresh adapter with one that was read from `previous`. Raises `InputError` if it is of other shape."""
    fresh = {name for name, *_ in lora_layers(model)}
    wanted = next(a.shape[0] for _, a, _, _ in lora_layers(model))
    if rank(past) != wanted:
        raise InputError(
            f"the same adapter is to be trained on, and {previous} has rank {rank(past)}",
            where="recipe",
            field="train.lora.r",
            remedy=f"Set it to {rank(past)}",
        )
    if fresh != set(past):
        raise InputError(
            f"the same adapter is to be trained on, and {previous} covers other layers: {_some(fresh ^ set(past))}",
            where="recipe",
            field="train.modules",
        )
    _fill(model, past, "default")


@torch.no_grad()
def _fill(model: PeftModel, adapter: Adapter, name: str) -> None:
    for module, a, b, scaling in lora_layers(model, name):
        a.copy_(adapter[module].a)
        b.copy_(adapter[module].b * (adapter[module].scaling / scaling))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
