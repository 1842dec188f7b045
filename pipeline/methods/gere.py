"""GeRe (arXiv 2508.04676): general samples in every global batch, on which the model stays near a fixed policy.

A few of the recipe's anchor samples come with each global batch. Their loss, sample by sample, is `label_weight` times
the cross-entropy of their answers plus `weight` times how far their last hidden states (or logits) have moved away from
those of the base, or of the policy that the stage began with: by the threshold-based margin loss `tm`, which asks only
for a unit's state, or by `kl`, `l1` or `l2`. With `weight: 0` only labels are fitted.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from mcit.data_prep import schema
from mcit.data_prep.identity import rank
from mcit.eval.hashing import cache_dir

from ..planning.outlook import Outlook, Passes
from ..policy.quantization import quantised
from ..training.replay import Replay, Replayed, backbone
from .anchor import Anchor, anchor_path, write_anchor
from .base import Method
from .keys import unpack
from .outputs import answer_loss, divergence
from .ternary import margin_loss

if TYPE_CHECKING:
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss


class GereConfig(schema.Config):
    """`method: {gere: {…}}`. The samples are the recipe's `anchors`."""

    samples: int = Field(default=1000, gt=0)  # of the anchors, at most: GeRe (code)
    per_batch: int = Field(default=4, ge=0)  # B_I, on top of the stage's own: GeRe (second-hand, 60 + 4 a batch)
    anchor: Literal["base", "stage_start"] = "base"  # base: GeRe (code, with one folder for all tasks)
    match: Literal["tm", "kl", "l1", "l2"] = "tm"
    # 100: GeRe (code, default); 1, and dynamic: as much as the cross-entropy, sample by sample
    weight: float | Literal["dynamic"] = 100.0
    weight_limit: float = Field(default=1000.0, gt=0)  # of dynamic; ours: GeRe's code divides by what can vanish
    label_weight: float = Field(default=1.0, ge=0)  # 1: GeRe (code, for a micro-batch with both kinds of samples)
    sigmas: float = Field(default=1.0, gt=0)  # of tm, from the mean to a threshold: GeRe (code)

    @field_validator("weight", mode="before")
    @classmethod
    def _number_or_dynamic(cls, value: Any) -> Any:
        if value == "dynamic" or (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
            return value
        raise PydanticCustomError("gere", "is neither a number from 0 on nor `dynamic`")

    @property
    def active(self) -> bool:
        """Whether anything is replayed."""
        return self.per_batch > 0 and (self.weight != 0 or self.label_weight != 0)

    @property
    def answers(self) -> bool:
        """Whether the cross-entropy of the answers is needed."""
        return self.label_weight > 0 or self.weight == "dynamic"


class Gere(Method):
    """General samples and what the anchor made of them."""

    name = "gere"
    paper = "GeRe, arXiv 2508.04676"
    category = "replay"
    keeps = "general data"
    cost = "`per_batch` more samples a step, one pass of the base over all of them, 2 bits a hidden unit on disk"
    lineages = (*Method.lineages, "full")
    Config = GereConfig
    neutral = {"per_batch": 0}  # noqa: RUF012

    config: GereConfig

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        if not self.config.active:
            return None
        chosen = sorted(kept, key=lambda sample: rank(f"{sample['task']} {sample['id']}"))[: self.config.samples]
        self.kinds = ["images" if sample["images"] else "text" for sample in chosen]
        return Replay(chosen, self.config.per_batch)

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        """Find the anchor's states on the samples, or make them; the base's are shared by all runs."""
        if not self.config.active:
            return
        if self.config.answers or self.config.match == "kl":
            self.head = trainer.output_head(self.name)
        if self.config.weight != 0:
            self.anchor = self._anchor(entered, trainer)

    def replay_loss(self, seen: Replayed) -> Tensor:
        rows = zip(seen.samples, seen.tokens, seen.hidden, seen.labels, strict=True)
        return torch.stack([self._loss(sample, h[:tokens], labels[:tokens]) for sample, tokens, h, labels in rows])

    def disk(self, outlook: Outlook) -> int:
        """The base's states, made once, in the cache; those of the policy that a stage began with go with the stage."""
        if not (self.config.active and self.config.weight) or self.config.anchor != "base" or outlook.stages > 1:
            return 0
        units = outlook.model.config.get_text_config().hidden_size
        item = 1 / 4 if self.config.match == "tm" else outlook.model.dtype.itemsize
        return round(min(self.config.samples, outlook.general) * outlook.general_length * units * item)

    def passes(self, outlook: Outlook) -> Passes:
        """One over all general samples, and under `tm` one before it for the thresholds."""
        made = self.config.active and self.config.weight and (self.config.anchor != "base" or outlook.stages == 1)
        seen = min(self.config.samples, outlook.general) * outlook.general_length
        return Passes(forward=seen * (1 + (self.config.match == "tm")) if made else 0)

    def _loss(self, sample: int, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of one sample, for `hidden` [tokens, units] and `labels` [tokens]."""
        config = self.config
        answers = answer_loss(hidden, labels, self.head) if config.answers else hidden.new_zeros(())
        if config.weight == 0:
            return config.label_weight * answers
        distance = self._distance(sample, hidden)
        weight: Tensor | float
        if config.weight == "dynamic":
            weight = (answers / (distance + 1e-8)).detach().clamp(max=config.weight_limit)
        else:
            weight = config.weight
        return config.label_weight * answers + weight * distance

    def _anchor(self, entered: "Entered", trainer: "MethodLoss") -> Anchor:
        base = self.config.anchor == "base" or entered.enters_base
        provenance = {
            "base": entered.before.model_dump(include={"base_hash", "dtype", "processor"}),
            "policy": entered.before.base_hash if base else entered.before.hash,
            "anchors": {name: task["train_hash"] for name, task in entered.anchors.items()},
            "samples": len(self.kinds),
            "layer": "after the last norm",
            **({"sigmas": self.config.sigmas} if self.config.match == "tm" else {}),
            **quantised(entered.recipe.base_model),
        }
        path = anchor_path(cache_dir() / "anchors" if base else entered.output_dir, provenance)
        if not broadcast_object_list([path.exists()])[0]:
            fresh = base and not entered.enters_base
            model = entered.load_base(trainer.accelerator) if fresh else entered.model
            write_anchor(
                path,
                provenance,
                lambda: trainer.look(model, self),
                self.kinds,
                units=backbone(entered.model).config.get_text_config().hidden_size,
                accelerator=trainer.accelerator,
                work=entered.output_dir,
            )
        return Anchor(path, provenance)

    def _distance(self, sample: int, hidden: Tensor) -> Tensor:
        """How far a sample's `hidden` [tokens, units] is from the anchor's."""
        kept = self.anchor.of(sample, len(hidden)).to(hidden.device, non_blocking=True)
        if self.config.match == "tm":
            thresholds = self.anchor.thresholds[self.kinds[sample]].to(hidden.device, non_blocking=True)
            return margin_loss(hidden, unpack(kept, 2, hidden.shape[1]), thresholds)
        if self.config.match == "kl":
            return divergence(hidden, kept, self.head)
        gap = hidden.float() - kept.float()
        return gap.abs().mean() if self.config.match == "l1" else gap.square().mean()
