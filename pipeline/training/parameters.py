"""What a stage trains of its model."""

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .replay import unwrapped
from .zero3 import gather


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a stage trains, by name; whole under ZeRO-3 too, for which all processes call this together."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gather(trained.values())
    return trained


def idle_parameters(model: nn.Module, sparse: bool = False) -> list[nn.Parameter]:
    """What is trained that a batch may leave out: on projector and vision tower, and of a `sparse` model anything."""
    whole = unwrapped(model)
    always = set() if sparse else {*whole.get_decoder().parameters(), *whole.get_output_embeddings().parameters()}
    return [parameter for parameter in trained_parameters(model).values() if parameter not in always]


def fingerprint(model: nn.Module) -> dict[str, float]:
    """A number for each trained parameter that changes when the parameter does."""
    return {
        name: parameter.detach().double().square().sum().item() for name, parameter in trained_parameters(model).items()
    }


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """`model` in evaluation mode; where it is to give `gradients`, its layers still checkpoint if they did."""
    training = model.training
    model.eval()
    for layer in model.modules() if gradients else ():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = training  # it alone: what is inside stays in evaluation mode
    try:
        yield
    finally:
        model.train(training)
