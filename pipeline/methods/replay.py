"""Experience replay (arXiv 1902.10486, sec. 3): samples of past stages are trained once more.

`ratio` of each past stage's samples, or a `buffer` of fixed size. With `per_batch: 0` they are mixed into the stage's
own, for supervised and for reinforcement tuning alike (what MLLM-CTBench's code does); else that many are beside
every global batch, and their answers' cross-entropy is added (the paper's, whose batch from memory is as large as the
new one). `ratio: 0` is neutral; so is a first stage, which has no past.
"""

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from mcit.data_prep import schema
from mcit.data_prep.errors import InputError

from ..training.replay import Replay, Replayed
from .base import Method, Past
from .buffer import Selection, ordered, parts, shares_by_age
from .outputs import answer_loss

if TYPE_CHECKING:
    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class ReplayConfig(schema.Config):
    """`method: {replay: {…}}`. docs/methods.md says what the selections and spacings are."""

    ratio: float | None = Field(default=None, ge=0, le=1)  # 0.2 unless a buffer is given: MLLM-CTBench (code)
    buffer: int | None = Field(default=None, gt=0)  # samples of all past stages together
    per_batch: int = Field(default=0, ge=0)  # beside each global batch; 0: mixed into the stage's own samples
    selection: Selection = "random"
    spacing: Literal["uniform", "power", "rested"] = "uniform"
    exponent: float = Field(default=1.0, ge=0)  # of spacing `power`: a stage n ago has a share of n^-exponent; ours

    @model_validator(mode="after")
    def _one_size(self) -> "ReplayConfig":
        if self.ratio is not None and self.buffer is not None:
            raise PydanticCustomError("replay", "`ratio` and `buffer` exclude each other")
        if self.ratio is None and self.buffer is None:
            self.ratio = 0.2
        if self.spacing == "rested" and not self.per_batch:
            raise PydanticCustomError("replay", "spacing `rested` needs `per_batch`: mixed samples come in no order")
        return self


class ExperienceReplay(Method):
    """Without state: what is kept follows from ids and seed."""

    name = "replay"
    paper = "Tiny episodic memories, arXiv 1902.10486"
    category = "replay"
    keeps = "past data"
    cost = "as many more steps as samples are mixed in, or `per_batch` more samples a step"
    lineages = ("stack", "fold", "continue", "full")
    Config = ReplayConfig
    neutral = {"ratio": 0}  # noqa: RUF012

    config: ReplayConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.kept: list[schema.Sample] = []
        if past and self.config.ratio != 0:
            for size, earlier in zip(self._sizes(stage.k, past), past.values(), strict=True):
                self.kept += ordered(earlier, samples, self.config.selection, stage.seed)[:size]
            if not self.kept:
                problem = f"keeps none of {sum(map(len, past.values()))} past samples"
                raise InputError(problem, where="recipe", field="method.replay.ratio", remedy="Raise it")
        return samples if self.config.per_batch else samples + self.kept

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        if not (self.config.per_batch and self.kept):
            return None
        return Replay(self.kept, self.config.per_batch, self.config.spacing == "rested")

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if self.config.per_batch and self.kept:
            self.head = trainer.output_head(self.name)

    def replay_loss(self, seen: Replayed) -> Tensor:
        rows = zip(seen.hidden, seen.labels, seen.tokens, strict=True)
        return torch.stack([answer_loss(h[:tokens], labels[:tokens], self.head) for h, labels, tokens in rows])

    def _sizes(self, k: int, past: Past) -> list[int]:
        """How many samples of each past stage are kept."""
        exponent = self.config.exponent if self.config.spacing == "power" else 0.0
        shares, sizes = shares_by_age(k, past, exponent), [len(samples) for samples in past.values()]
        if self.config.buffer:
            return parts(sizes, shares, self.config.buffer)
        return [round((self.config.ratio or 0) * share * size) for share, size in zip(shares, sizes, strict=True)]
