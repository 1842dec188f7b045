"""LwF (arXiv 1606.09282, eq. 2-3): on the new task's own samples, predictions stay near those of the policy before it.

The loss gains `weight` times KL(before || now) of the answer's tokens, both at temperature 2; its gradient is that of
the paper's cross-entropy with recorded probabilities. A mean over a sample's tokens, then over samples. Nothing is
stored: the policy before is the model with the weights that the stage began with. In GRPO, TRL's KL to
`train.reference: previous` is this. `weight: 0` is neutral; the base, too, is a policy to stay near, so it acts from
the first stage on.
"""

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..planning.outlook import FLOAT, Outlook, Passes
from ..training.collator import IGNORED
from .base import Method, StepView
from .outputs import distance_to
from .previous import Previous

if TYPE_CHECKING:
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class LwfConfig(schema.Config):
    """`method: {lwf: {…}}`."""

    weight: float = Field(default=1.0, ge=0)  # lambda_o = 1: LwF (paper) and MLLM-CTBench (code, Qwen2.5-VL)
    temperature: float = Field(default=2.0, gt=0)  # LwF (paper)


class Lwf(Method):
    """Learning without forgetting."""

    name = "lwf"
    paper = "LwF, TPAMI 2018, arXiv 1606.09282"
    category = "distillation"
    keeps = "nothing"
    cost = "one more forward pass a step; a copy of what trains"
    lineages = ("stack", "fold", "continue", "full")
    paradigms = ("sft",)
    Config = LwfConfig
    neutral = {"weight": 0}  # noqa: RUF012
    needs_hidden = True

    config: LwfConfig

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if self.config.weight:
            self.head = trainer.output_head(self.name)
            self.previous = Previous(trainer)

    def memory(self, outlook: Outlook) -> float:
        """What trains as it was, and what it said of a micro-batch's answers, word by word."""
        if not self.config.weight:
            return 0
        said = outlook.micro_batch * outlook.answer * outlook.model.config.get_text_config().vocab_size
        return FLOAT * (outlook.trained + said)

    def passes(self, outlook: Outlook) -> Passes:
        return Passes(forward=outlook.tokens if self.config.weight else 0)

    def loss(self, view: StepView) -> Tensor | None:
        if not self.config.weight:
            return None
        assert view.hidden is not None
        # Of every micro-batch, whatever it learns from: under ZeRO-3 the processes wait for each other.
        then = self.previous.answers(view.inputs, self.head, self.config.temperature)
        gaps = [
            distance_to(now[:-1][labels[1:] != IGNORED], target, self.head, self.config.temperature)
            for now, target, labels in zip(view.hidden, then, view.inputs["labels"], strict=True)
            if len(target)
        ]
        if not gaps:
            return view.hidden.new_zeros(())
        return self.config.weight * view.share * torch.stack(gaps).mean()
