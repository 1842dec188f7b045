"""DER and DER++ (arXiv 2004.07211, eq. 5 and 6): on past samples, logits stay what they were when these were learned.

`per_batch` samples of a buffer are beside every global batch. Their loss is `weight` (alpha) times the mean squared
distance of the logits that predict their answer from those at the end of their stage, plus `label_weight` (beta; 0 is
DER, more DER++) times the answer's cross-entropy. Of each token's logits the `top` largest are kept. `per_batch: 0`
is neutral.
"""

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema
from mcit.data_prep.errors import InputError

from ..planning.outlook import Outlook, Passes
from ..training.collator import IGNORED
from ..training.replay import Replay, Replayed
from .base import Method, Past
from .buffer import cut, ordered
from .outputs import answer_loss, logit_gap, logits

if TYPE_CHECKING:
    from peft import PeftModel

    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


KEPT_BYTES = 2 + 4  # of a kept logit: its value, and which it is


class DerConfig(schema.Config):
    """`method: {der: {…}}`; `derpp` is this with `label_weight: 0.5`."""

    buffer: int = Field(default=500, gt=0)  # samples of all past stages together: one of the paper's sizes
    per_batch: int = Field(default=8, ge=0)  # ours; the paper's is the batch of the new task
    weight: float = Field(default=0.5, ge=0)  # alpha: MLLM-CTBench (code)
    label_weight: float = Field(default=0.0, ge=0)  # beta
    top: int = Field(default=32, gt=0)  # ours; the paper keeps all logits, of 10 to 200 classes


class Der(Method):
    """State: by sample (`task/id`) and answer token the largest logits, float16, and which they are, int32."""

    name = "der"
    paper = "DER, NeurIPS 2020, arXiv 2004.07211"
    category = "replay"
    keeps = "past data"
    cost = "`per_batch` more samples a step, one pass over what is kept, 6 bytes a kept logit on disk"
    lineages = ("stack", "fold", "continue", "full")
    conflicts = ("replay",)  # a buffer of its own
    Config = DerConfig
    neutral = {"per_batch": 0}  # noqa: RUF012

    config: DerConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.logits = state
        self.past = {
            k: [one for one in ordered(earlier, samples, "random", stage.seed) if f"{_key(one)}.values" in state]
            for k, earlier in past.items()
        }
        self.seed = stage.seed
        self.kept = [sample for part in cut(self.past, self.config.buffer) for sample in part]
        return samples

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        return Replay(self.kept, self.config.per_batch) if self.kept and self.config.per_batch else None

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if self.config.per_batch:
            self.trainer, self.head = trainer, trainer.output_head(self.name)

    def replay_loss(self, seen: Replayed) -> Tensor:
        rows = zip(seen.samples, seen.hidden, seen.labels, seen.tokens, strict=True)
        return torch.stack([self._loss(self.kept[i], h[:tokens], labels[:tokens]) for i, h, labels, tokens in rows])

    def finish(self, model: "PeftModel", samples: list[schema.Sample]) -> dict[str, Tensor]:
        if not self.config.per_batch:
            return {}
        own = ordered(samples, [], "random", self.seed)
        *earlier, new = cut({**self.past, max(self.past, default=0) + 1: own}, self.config.buffer)
        state = {
            f"{_key(one)}.{part}": self.logits[f"{_key(one)}.{part}"]
            for stage in earlier
            for one in stage
            for part in ("values", "places")
        }
        return state | self._recorded(samples, new)

    def disk(self, outlook: Outlook) -> int:
        """As if every stage so far had had as many samples as this one, with answers as long."""
        if not self.config.per_batch:
            return 0
        kept = min(self.config.buffer, outlook.stages * outlook.samples)
        top = min(self.config.top, outlook.model.config.get_text_config().vocab_size)
        return round(kept * outlook.answer * top * KEPT_BYTES)

    def passes(self, outlook: Outlook) -> Passes:
        new = min(self.config.buffer // outlook.stages, outlook.samples)
        return Passes(forward=new * outlook.length if self.config.per_batch else 0)

    def _loss(self, sample: schema.Sample, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of one sample, for `hidden` [tokens, units] and `labels` [tokens]."""
        values, places = (self.logits[f"{_key(sample)}.{part}"].to(hidden.device) for part in ("values", "places"))
        answer = hidden[:-1][labels[1:] != IGNORED]
        if len(values) != len(answer):
            problem = f"the answer of {_key(sample)} had {len(values)} tokens and has {len(answer)} now"
            raise InputError(problem, where="method der", remedy="Train the stages before again")
        loss = self.config.weight * logit_gap(answer, places, values, self.head)
        if self.config.label_weight:
            loss = loss + self.config.label_weight * answer_loss(hidden, labels, self.head)
        return loss

    def _recorded(self, samples: list[schema.Sample], new: list[schema.Sample]) -> dict[str, Tensor]:
        """The logits of `new`, which are among `samples`; all processes look at their part and get all."""
        index = {_key(sample): i for i, sample in enumerate(samples)}
        mine: dict[str, Any] = {}
        for one in self.trainer.look_at(self.trainer.model, [index[_key(sample)] for sample in new]):
            for i, hidden, labels in zip(one.indices, one.hidden, one.labels, strict=True):
                found = logits(hidden[:-1][labels[1:] != IGNORED], self.head)
                top = found.topk(min(self.config.top, found.shape[1]), dim=-1)
                mine[f"{_key(samples[i])}.values"] = top.values.half().cpu()
                mine[f"{_key(samples[i])}.places"] = top.indices.int().cpu()
        return {key: value for part in gather_object([mine]) for key, value in part.items()}


def _key(sample: schema.Sample) -> str:
    return f"{sample['task']}/{sample['id']}"
