"""ZeRO-3 parts every weight among the processes; what a stage trains stays whole, as methods and lineages need it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Trainer


def keep_whole(trainer: "Trainer", parameters: Iterable[Tensor]) -> None:
    """Have DeepSpeed part with nothing as small as the largest of `parameters`, once it is gathered.

    Call it before training. Biases, norms and small layers of the base stay whole with them.
    """
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    config["stage3_param_persistence_threshold"] = max(parameter.numel() for parameter in parameters)
    # TRL asks for reentrant checkpointing, as DeepSpeed before 0.19.8 needed beside frozen weights. Under it a gradient
    # arrives twice where a method's term uses a factor too, which DeepSpeed does not take.
    kwargs: Any = trainer.args.gradient_checkpointing_kwargs or {}
    trainer.args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": False}


def gather(parameters: Iterable[Tensor]) -> None:
    """Make parameters whole that are not, such as at the start of training; all processes call it together.

    Does nothing but under ZeRO-3. They remain whole if `keep_whole` covers them.
    """
    parted: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_status")]
    if parted:
        parted[0].all_gather(parted)  # those that are whole are passed over


def whole(layer: nn.Linear) -> nn.Linear:
    """A frozen layer, or under ZeRO-3 a copy of it that every process has whole; all processes call it together.

    The layer itself can only be run there by all processes at the same time, and is parted again after each pass.
    """
    parameters = list(layer.parameters())
    if not any(hasattr(parameter, "ds_status") for parameter in parameters):
        return layer
    import deepspeed  # here: takes seconds

    copy = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta").requires_grad_(False)
    with deepspeed.zero.GatheredParameters(parameters):
        copy.load_state_dict({name: value.detach().clone() for name, value in layer.named_parameters()}, assign=True)
    return copy
