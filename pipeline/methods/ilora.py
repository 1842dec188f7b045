"""I-LoRA (arXiv 2402.18865): a fast LoRA learns, a slow one averages it, and past samples tie the two together.

    after each step  θ_slow ← decay · θ_slow + (1 − decay) · θ_fast
    loss gains, on past samples,  CE(fast) + weight · mean (h_fast − h_slow)²

h are last hidden states, a mean over a sample's tokens. The slow LoRA is evaluated (`serve: fast` evaluates the
other), and the fast one trains on. In the official code the average never moves: it is looked up by a name that does
not exist. Its decay is 0.25 there, and its distance one-sided and over all layers. `per_batch: 0` and `serve: fast`
are neutral.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from mcit.data_prep import schema
from mcit.eval.lora import Adapter, Dense, Factors

from ..planning.outlook import FLOAT, Outlook, Passes
from ..training.parameters import evaluating, trained_parameters
from ..training.replay import Replay, Replayed, backbone
from .base import Method, Past
from .buffer import even_buffer
from .outputs import answer_loss
from .previous import swapped

if TYPE_CHECKING:
    from peft import PeftModel

    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class ILoraConfig(schema.Config):
    """`method: {ilora: {…}}`."""

    decay: float = Field(default=0.99, ge=0, lt=1)  # lambda; ours
    weight: float = Field(default=1.0, ge=0)  # gamma: I-LoRA (code)
    buffer: int = Field(default=500, gt=0)  # samples of all past stages together: I-LoRA (code)
    per_batch: int = Field(default=8, ge=0)  # ours; as many as the task's in the code
    serve: Literal["slow", "fast"] = "slow"

    @property
    def averages(self) -> bool:
        """Whether there is a slow LoRA."""
        return self.serve == "slow" or (self.per_batch > 0 and self.weight > 0)


class ILora(Method):
    """State: the slow factors, by name."""

    name = "ilora"
    paper = "I-LoRA, ICASSP 2025, arXiv 2402.18865"
    category = "schedule"
    keeps = "past data"
    cost = "a second adapter; `per_batch` more samples a step, through both"
    lineages = ("continue",)
    distributed = ("single", "ddp", "zero2")
    conflicts = ("replay", "der")
    needs_lora = True
    Config = ILoraConfig
    neutral = {"per_batch": 0, "serve": "fast"}  # noqa: RUF012

    config: ILoraConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.kept = even_buffer(past, self.config.buffer, stage.seed)
        return samples

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        return Replay(self.kept, self.config.per_batch) if self.kept and self.config.per_batch else None

    def build(self, model: "PeftModel", state: dict[str, Tensor]) -> None:
        self.slow = state

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if not self.config.averages:
            return
        self.trainer = trainer
        if self.kept and self.config.per_batch:
            self.head = trainer.output_head(self.name)
        trained = trained_parameters(trainer.model)
        self.frozen = {name: weight for name, weight in self.slow.items() if name not in trained}  # by another method
        self.slow = {
            name: self.slow.get(name, weight.detach()).to(weight.device, torch.float32, copy=True)
            for name, weight in trained.items()
        }

    def callbacks(self) -> list[TrainerCallback]:
        return [_Average(self)] if self.config.averages else []

    @torch.no_grad()
    def average(self) -> None:
        """Move the slow LoRA a step towards the fast one."""
        for name, weight in trained_parameters(self.trainer.model).items():
            self.slow[name].lerp_(weight.float(), 1 - self.config.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": {name: weight.cpu() for name, weight in self.slow.items()}} if self.config.averages else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weight in state.get("slow", {}).items():
            self.slow[name].copy_(weight)

    def replay_loss(self, seen: Replayed) -> Tensor:
        rows = list(zip(seen.hidden, seen.labels, seen.tokens, strict=True))
        losses = torch.stack([answer_loss(h[:tokens], labels[:tokens], self.head) for h, labels, tokens in rows])
        if not self.config.weight:
            return losses
        gaps = [
            (fast[:tokens].float() - slow[:tokens].float()).square().mean()
            for (fast, _, tokens), slow in zip(rows, self._slow_states(seen.samples), strict=True)
        ]
        return losses + self.config.weight * torch.stack(gaps)

    def hand_over(self) -> dict[str, Tensor]:
        return self._averages()

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        return self._averages()

    def _averages(self) -> dict[str, Tensor]:
        slow = {name: weight.cpu() for name, weight in self.slow.items()}
        return self.frozen | slow if self.config.averages else {}

    def disk(self, outlook: Outlook) -> int:
        return FLOAT * outlook.lora * (self.config.averages + (self.config.serve == "slow"))

    def memory(self, outlook: Outlook) -> float:
        return FLOAT * outlook.trained if self.config.averages else 0

    def passes(self, outlook: Outlook) -> Passes:
        tied = self.config.per_batch > 0 and self.config.weight > 0 and outlook.stages > 1
        return Passes(forward=outlook.steps * self.config.per_batch * outlook.length if tied else 0)

    def served(self, policy: Adapter, state: Mapping[str, Tensor]) -> Mapping[str, Factors | Dense] | None:
        if self.config.serve == "fast":
            return None

        def factor(layer: str, part: str, own: Tensor) -> Tensor:  # its own where it has never been trained
            return state.get(f"base_model.model.{layer}.lora_{part}.default.weight", own)

        return {
            name: Factors(factor(name, "A", one.a), factor(name, "B", one.b), one.scaling)
            for name, one in policy.items()
        }

    @torch.no_grad()
    def _slow_states(self, samples: list[int]) -> Tensor:
        """Last hidden states of the slow model, [samples, length, units]."""
        trainer, model = self.trainer, self.trainer.model
        inputs = trainer._prepare_input(trainer.collator.collate([self.kept[i] for i in samples]))
        inputs.pop("labels")
        with evaluating(model), swapped(model, self.slow), trainer.accelerator.autocast():
            states: Tensor = backbone(model)(**inputs, use_cache=False).last_hidden_state
        return states


class _Average(TrainerCallback):
    def __init__(self, method: ILora):
        self.method = method

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.average()
