"""The policy that a stage began with, beside the one in training: the weights that train are kept as they were."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.collator import IGNORED
from ..training.parameters import evaluating, trained_parameters
from ..training.replay import backbone
from .outputs import logits

if TYPE_CHECKING:
    from ..training.trainer import MethodLoss


class Previous:
    """A copy of what trains, put in place for single forward passes. Make it in `Method.begin`."""

    def __init__(self, trainer: "MethodLoss"):
        self.trainer = trainer
        self.weights = {name: weight.detach().clone() for name, weight in trained_parameters(trainer.model).items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The model as it was, in evaluation mode, without gradients."""
        model = self.trainer.model
        with torch.no_grad(), evaluating(model), swapped(model, self.weights), self.trainer.accelerator.autocast():
            yield model

    def answers(self, inputs: Mapping[str, Any], head: nn.Linear, temperature: float) -> list[Tensor]:
        """Log-probabilities [answer tokens, vocabulary] that it gave each row of a micro-batch, at `temperature`."""
        with self.in_place() as model:
            fields = {key: value for key, value in inputs.items() if key != "labels"} | {"use_cache": False}
            states = backbone(model)(**fields).last_hidden_state
            return [
                F.log_softmax(logits(hidden[:-1][labels[1:] != IGNORED], head) / temperature, -1)
                for hidden, labels in zip(states, inputs["labels"], strict=True)
            ]


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`model` with other values in the parameters named; what autograd has saved of them stays valid."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].data for name in weights}
    try:
        for name, value in weights.items():
            parameters[name].data = value.to(parameters[name])
        yield
    finally:
        for name, value in own.items():
            parameters[name].data = value
