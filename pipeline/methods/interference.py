"""Modality-interference training (arXiv 2505.19616): what the other modality says beside the point must change nothing.

`per_batch` of the stage's own samples are in every global batch once more, perturbed: a sample with images gets a
question of another sample before its own, one without gets an image of another sample, or of noise where the stage
has none. Their loss is the cross-entropy of the same answer plus `weight` times KL(as it was || perturbed) of the
answer's tokens, whose target is the model's own prediction on the sample as it was. The paper's heuristic
perturbations; its adversarial ones (by projected gradients on the inputs) are left out. `per_batch: 0` is neutral.
"""

import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from mcit.data_prep import schema

from ..planning.outlook import Outlook, Passes
from ..training.collator import IGNORED
from ..training.parameters import evaluating
from ..training.replay import Replay, Replayed, backbone
from .base import Method, Past
from .outputs import answer_loss, distance_to, logits

if TYPE_CHECKING:
    from ..recipe.schema import Stage
    from ..stage.entering import Entered
    from ..training.trainer import MethodLoss

SIDE = 64  # of an image of noise, in pixels


class InterferenceConfig(schema.Config):
    """`method: {interference: {…}}`."""

    per_batch: int = Field(default=8, ge=0)  # ours
    weight: float = Field(default=1.0, ge=0)  # lambda; ours


class Interference(Method):
    """Perturbed copies of the stage's own samples."""

    name = "interference"
    paper = "Modality interference, arXiv 2505.19616"
    category = "regularisation"
    keeps = "nothing"
    cost = "`per_batch` more samples a step, and a pass without gradients over as many"
    lineages = ("stack", "fold", "continue", "independent")
    distributed = ("single", "ddp", "zero2")  # under ZeRO-3, all processes would have to make the same passes
    Config = InterferenceConfig
    neutral = {"per_batch": 0}  # noqa: RUF012

    config: InterferenceConfig

    def data(
        self, stage: "Stage", samples: list[schema.Sample], past: Past, state: dict[str, Tensor]
    ) -> list[schema.Sample]:
        self.samples, self.seed = samples, stage.seed
        return samples

    def replay(self, kept: list[schema.Sample]) -> Replay | None:
        if not (self.config.per_batch and self.samples):
            return None
        self.noise = tempfile.TemporaryDirectory(prefix="mcit-noise-")  # goes with the process
        file = Path(self.noise.name) / "noise.png"
        pixels = np.random.default_rng(self.seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        return Replay(perturbed(self.samples, str(file), self.seed), self.config.per_batch)

    def begin(self, entered: "Entered", trainer: "MethodLoss") -> None:
        if self.config.per_batch:
            self.trainer, self.head = trainer, trainer.output_head(self.name)

    def replay_loss(self, seen: Replayed) -> Tensor:
        rows = list(zip(seen.hidden, seen.labels, seen.tokens, strict=True))
        losses = torch.stack([answer_loss(h[:tokens], labels[:tokens], self.head) for h, labels, tokens in rows])
        if not self.config.weight:
            return losses
        gaps = []
        for (hidden, labels, _), target in zip(rows, self._as_they_were(seen.samples), strict=True):
            gaps.append(distance_to(hidden[:-1][labels[1:] != IGNORED], target, self.head, 1.0))
        return losses + self.config.weight * torch.stack(gaps)

    def passes(self, outlook: Outlook) -> Passes:
        seen = outlook.steps * self.config.per_batch * outlook.length
        return Passes(forward=seen if self.config.weight else 0)

    @torch.no_grad()
    def _as_they_were(self, samples: list[int]) -> list[Tensor]:
        """Log-probabilities [answer tokens, vocabulary] that the model gives on the unperturbed samples."""
        trainer, model = self.trainer, self.trainer.model
        found: dict[int, Tensor] = {}
        for pictured in (True, False):  # a batch is with images or without
            chosen = [i for i in samples if bool(self.samples[i]["images"]) == pictured]
            if chosen:
                inputs = trainer._prepare_input(trainer.collator.collate([self.samples[i] for i in chosen]))
                labels = inputs.pop("labels")
                with evaluating(model), trainer.accelerator.autocast():
                    states = backbone(model)(**inputs, use_cache=False).last_hidden_state
                for i, hidden, row in zip(chosen, states, labels, strict=True):
                    found[i] = F.log_softmax(logits(hidden[:-1][row[1:] != IGNORED], self.head), -1)
        return [found[i] for i in samples]


def perturbed(samples: list[schema.Sample], noise: str, seed: int) -> list[schema.Sample]:
    """Each sample with what does not concern it from the other modality; `noise` is an image's path."""
    pictured = [sample for sample in samples if sample["images"]]

    def one(sample: schema.Sample) -> schema.Sample:
        rng = random.Random(f"interference {seed} {sample['task']} {sample['id']}")
        if not sample["images"]:
            image = rng.choice(rng.choice(pictured)["images"]) if pictured else noise
            return {**sample, "images": [image]}
        others = [other for other in (rng.choice(samples) for _ in range(8)) if other is not sample] or [sample]
        prompt = list(sample["prompt"])
        turn = next(i for i, message in enumerate(prompt) if message["role"] == "user")
        text = f"{others[0]['prompt'][-1]['content']}\n{prompt[turn]['content']}"
        prompt[turn] = {**prompt[turn], "content": text}
        return {**sample, "prompt": prompt}

    return [one(sample) for sample in samples]
