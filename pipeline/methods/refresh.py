"""Refresh learning (arXiv 2403.13249, alg. 1): before each step the batch is unlearned a little, then learned as usual.

    θ ← θ + step · (‖θ‖ / ‖g‖ · g + noise · N(0, I)) / (1 + damping · F)        g = ∇ cross-entropy of the batch

tensor by tensor, an ascent. F is the importance of the weights to the stage before, the diagonal of the Fisher
information. As in the official code: the gradient is rescaled to the weights' norm, so that only its direction counts,
and of F only the last stage's is left. It is meant to go with others; `method: {refresh: {}, der: {label_weight: 0.5}}`
is the paper's. Where a weight is zero, as B of a fresh LoRA, so is its step. `step: 0` is neutral.
"""

from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from mcit.data_prep import schema

from ..planning.outlook import FLOAT, Outlook, Passes
from ..training.collator import IGNORED, REPLAYED, REPLAYED_LABELS
from ..training.parameters import evaluating, trained_parameters
from ..training.replay import backbone
from .base import Method
from .ewc import surprise
from .importance import measured
from .outputs import answer_loss

if TYPE_CHECKING:
    from peft import PeftModel

    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class RefreshConfig(schema.Config):
    """`method: {refresh: {…}}`."""

    step: float = Field(default=1e-5, ge=0)  # of the weights' norm: code
    damping: float = Field(default=0.001, ge=0)  # code
    noise: float = Field(default=0.001, ge=0)  # code
    every: int = Field(default=1, gt=0)  # steps: 1 code, 2 paper (second-hand)
    samples: int = Field(default=256, gt=0)  # of the stage, at most, by which F is measured: ours


class Refresh(Method):
    """State: F of the last stage, by name, under `continue` and `full`; others train fresh weights, without an F."""

    name = "refresh"
    paper = "Refresh learning, ICLR 2024, arXiv 2403.13249"
    category = "schedule"
    keeps = "nothing"
    cost = "one more forward and backward pass a step; `samples` gradients at the end of a stage"
    lineages = ("stack", "fold", "continue", "full")
    paradigms = ("sft",)
    distributed = ("single", "ddp")  # DeepSpeed steps from weights of its own, which this would not move
    Config = RefreshConfig
    neutral = {"step": 0}  # noqa: RUF012

    config: RefreshConfig

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.fisher = state

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if not self.config.step:
            return
        self.trainer, self.head = trainer, trainer.output_head(self.name)
        self.resumes = entered.stage.train.lineage in ("continue", "full")
        self.noise = torch.Generator().manual_seed(entered.seed)  # of its own, the same on all processes

    def callbacks(self) -> list[TrainerCallback]:
        return [_Unlearn(self)] if self.config.step else []

    def unlearn(self) -> None:
        """One step of ascent on the samples that the coming step learns from."""
        trained = trained_parameters(self.trainer.model)
        for name, gradient in self._gradients(trained).items():
            noise = torch.randn(gradient.shape, generator=self.noise).to(gradient)
            fisher = self.fisher.get(name, torch.zeros(())).to(gradient.device)
            weight = trained[name].detach()
            weight.add_(ascent(weight, gradient, fisher, noise, self.config))

    def state_dict(self) -> dict[str, Any]:
        return {"noise": self.noise.get_state()} if self.config.step else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.noise.set_state(state["noise"])

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not (self.config.step and self.resumes):
            return {}
        return measured(
            self.trainer, samples, self.config.samples, lambda h, labels: surprise(h, labels, self.head), torch.square
        )

    def disk(self, outlook: Outlook) -> int:
        resumes = outlook.stage.train.lineage in ("continue", "full")
        return FLOAT * outlook.trained if self.config.step and resumes else 0

    def memory(self, outlook: Outlook) -> float:
        """The gradients of a batch, summed over micro-batches; those of training are not there yet."""
        return FLOAT * outlook.trained if self.config.step else 0

    def passes(self, outlook: Outlook) -> Passes:
        if not self.config.step:
            return Passes()
        measured = outlook.stage.train.lineage in ("continue", "full")
        seen = measured * min(self.config.samples, outlook.samples) * outlook.length
        return Passes(gradients=outlook.tokens / self.config.every + seen)

    def _gradients(self, trained: dict[str, Any]) -> dict[str, Tensor]:
        """Of the samples' cross-entropy, a mean over the coming global batch."""
        trainer, model = self.trainer, self.trainer.model
        total = [torch.zeros_like(weight) for weight in trained.values()]
        learned = torch.zeros((), device=trainer.args.device)
        with evaluating(model, gradients=True), torch.enable_grad(), trainer.accelerator.autocast():
            for batch in trainer.coming:
                inputs = trainer._prepare_input(
                    {k: v for k, v in batch.items() if k not in (REPLAYED, REPLAYED_LABELS)}
                )
                labels = inputs.pop("labels")
                states = backbone(model)(**inputs, use_cache=False).last_hidden_state
                losses = [
                    answer_loss(hidden, row, self.head)
                    for hidden, row in zip(states, labels, strict=True)
                    if (row[1:] != IGNORED).any()
                ]
                if losses:
                    found = torch.autograd.grad(torch.stack(losses).sum(), list(trained.values()), allow_unused=True)
                    for one, gradient in zip(total, found, strict=True):
                        if gradient is not None:
                            one += gradient
                    learned += len(losses)
        count = trainer.accelerator.reduce(learned, "sum")
        return {name: trainer.accelerator.reduce(one, "sum") / count for name, one in zip(trained, total, strict=True)}


def ascent(weight: Tensor, gradient: Tensor, fisher: Tensor, noise: Tensor, config: RefreshConfig) -> Tensor:
    """What is added to a tensor of weights."""
    direction = weight.norm() / (gradient.norm() + 1e-20) * gradient
    return config.step * (direction + config.noise * noise) / (1 + config.damping * fisher)


class _Unlearn(TrainerCallback):
    def __init__(self, method: Refresh):
        self.method = method

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.method.config.every == 0:
            self.method.unlearn()
