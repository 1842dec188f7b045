"""The distance of what trains from where the stage began, weighted by how much past tasks need each weight.

    weight / 2 · Σ Ω (θ − θ*)²                  θ* the weights as the stage began, Ω the importance

What EWC and MAS share: they differ in Ω, of which a method says what one sample's gradient adds. Once per optimizer
step. The weights are LoRA's factors, which `continue` trains on, or under `full` all that train, as in the papers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.data_prep.identity import rank

from ..planning.outlook import FLOAT, Outlook, Passes
from ..training.parameters import trained_parameters
from .base import Method, StepView

if TYPE_CHECKING:
    from peft import PeftModel

    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


_START = "start of "  # before the names of weights, in what a first phase hands over


class ImportanceConfig(schema.Config):
    """What EWC and MAS have in common."""

    weight: float = Field(ge=0)  # lambda
    decay: float = Field(default=1.0, ge=0, le=1)  # gamma: what is left of past importance after another stage
    samples: int = Field(default=256, gt=0)  # of the stage, at most, by which importance is measured: ours
    normalise: bool = False  # each tensor's importance by its own mean: MLLM-CTBench (code)
    share: float = Field(default=1.0, gt=0, le=1)  # of each tensor's weights, the most important: MLLM-CTBench (code)


class Importance(Method):
    """A quadratic penalty. State: the importance of every weight that trains, by its name, float32."""

    category = "regularisation"
    keeps = "nothing"
    cost = "twice the trained weights in memory, once on disk; `samples` gradients at the end of a stage"
    lineages = ("continue", "full")

    config: ImportanceConfig

    def of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """What is differentiated: of a sample's last hidden states [tokens, units] and labels [tokens]."""
        raise NotImplementedError

    def importance(self, gradient: Tensor) -> Tensor:
        """What a sample's gradient adds to the importance of each weight."""
        raise NotImplementedError

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.past = {name: omega for name, omega in state.items() if not name.startswith(_START)}
        self.start = {name.removeprefix(_START): kept for name, kept in state.items() if name.startswith(_START)}

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if not self.config.weight:
            return
        self.trainer = trainer
        self.head = trainer.output_head(self.name)
        entering = trained_parameters(entered.model)
        self.pulls = {
            name: (self.past[name].to(weight.device), self.start.get(name, weight.detach()).to(weight, copy=True))
            for name, weight in entering.items()
            if name in self.past
        }

    def hand_over(self) -> dict[str, Tensor]:
        """Of a second phase the stage has begun with the first."""
        if not self.config.weight:
            return {}
        return self.past | {f"{_START}{name}": start.cpu() for name, (_, start) in self.pulls.items()}

    def loss(self, view: StepView) -> Tensor | None:
        if not (self.config.weight and view.last and self.pulls):
            return None
        return self.config.weight / 2 * distance(trained_parameters(view.model), self.pulls)

    def disk(self, outlook: Outlook) -> int:
        return FLOAT * outlook.trained if self.config.weight else 0

    def memory(self, outlook: Outlook) -> float:
        """The importance, and the weights as the stage began."""
        return 2 * FLOAT * outlook.trained if self.config.weight and outlook.resumes else 0

    def passes(self, outlook: Outlook) -> Passes:
        seen = min(self.config.samples, outlook.samples) * outlook.length
        return Passes(gradients=seen if self.config.weight else 0)

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.weight:
            return {}
        found = measured(self.trainer, samples, self.config.samples, self.of, self.importance)
        for omega in found.values():
            if self.config.normalise:
                omega /= omega.mean().clamp_min(torch.finfo(omega.dtype).tiny)
            keep_largest(omega, self.config.share)
        return self.past | {  # what another method froze in this stage counts on
            name: omega + self.config.decay * self.past[name] if name in self.past else omega
            for name, omega in found.items()
        }


def measured(
    trainer: "MethodLoss",
    samples: Sequence[schema.Sample],
    count: int,
    of: Callable[[Tensor, Tensor], Tensor],
    adds: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """The mean over `count` of the samples of what their gradients of `of` add, by name, on the CPU.

    Which samples these are depends on their ids alone; each process sees its part of them, and all get the result.
    """
    ranks = {index: rank(f"{sample['task']} {sample['id']}") for index, sample in enumerate(samples)}
    chosen = sorted(ranks, key=lambda index: ranks[index])[:count]
    total = {
        name: torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in trained_parameters(trainer.model).items()
    }
    for gradients in trainer.gradients(chosen, of):
        for name, gradient in gradients.items():
            total[name] += adds(gradient.float())
    return {name: (trainer.accelerator.reduce(summed, "sum") / len(chosen)).cpu() for name, summed in total.items()}


def distance(weights: Mapping[str, Tensor], pulls: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Σ Ω (θ − θ*)², for `pulls` of (Ω, θ*) by name."""
    parts = [(omega * (weights[name] - start).square()).sum() for name, (omega, start) in pulls.items()]
    return torch.stack(parts).sum()


def keep_largest(omega: Tensor, share: float) -> None:
    """Zero all but the largest `share` of the values, in place."""
    dropped = omega.numel() - max(1, round(share * omega.numel()))
    if dropped:
        omega.view(-1)[omega.view(-1).argsort(stable=True)[:dropped]] = 0
