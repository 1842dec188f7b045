"""TRL's own trainers as they are, on the model, LoRA, batches and arguments of a stage of ours."""

import random
from collections.abc import Sequence
from typing import Any

from rows import conversations
from trl import GRPOTrainer, SFTTrainer

from mcit.data_prep.schema import Message, Sample
from mcit.pipeline.reinforcement.prompts import prompt_dataset
from mcit.pipeline.reinforcement.trainer import StageGRPOTrainer
from mcit.pipeline.stage.entering import Entered
from mcit.pipeline.training.arguments import make_config
from mcit.pipeline.training.batches import GlobalBatchSampler, same_images, with_images
from mcit.pipeline.training.head import labels_alone
from mcit.pipeline.training.trainer import MethodLoss


class PlainSFT(MethodLoss, SFTTrainer):
    """TRL's `SFTTrainer`; what a stage asks of its trainer beside training comes from `MethodLoss`."""


class LabelsSFT(PlainSFT):
    """As TRL is on a GPU, where it scores tokens that have a label, and no others."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with labels_alone():
            return super().compute_loss(*args, **kwargs)


class PlainGRPO(MethodLoss, GRPOTrainer):
    """TRL's `GRPOTrainer` on the same prompts in the same order."""

    _get_train_sampler = StageGRPOTrainer._get_train_sampler


class LabelsGRPO(PlainGRPO):
    """As TRL is on a GPU."""

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        with labels_alone():
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


def sft(entered: Entered, merged: bool = False, made: type[PlainSFT] = PlainSFT) -> PlainSFT:
    """The trainer of an SFT stage: TRL's collator, one row a sample, the same samples in a batch as ours.

    With `merged`, the questions on a picture are turns of one row, and what is asked later carries loss too.
    """
    train, samples = entered.stage.train, entered.samples
    size = train.batch_size("sft")
    alike = same_images(samples) if train.sft.order == "by_image" else None
    order = GlobalBatchSampler(with_images(samples), size, size, 1, entered.seed, alike=alike)
    rows = [samples[index] for step in order for index in step.samples]
    at_once = train.sft.args["per_device_train_batch_size"]
    own = {"max_length": None, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": size // at_once}
    if merged:
        rows = merge(rows)
        own["per_device_train_batch_size"] = at_once * len(rows) // len(samples)
    return made(
        model=entered.model,
        args=make_config(entered, own),
        train_dataset=conversations(rows),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
    )


def merge(samples: Sequence[Sample]) -> list[Sample]:
    """One sample a picture: its questions and answers one after the other."""
    rows = dict[Any, Sample]()
    for sample, picture in zip(samples, same_images(samples), strict=True):
        if (row := rows.get(picture)) is None:
            rows[picture] = sample
        else:
            turns: list[Message] = [*row["completion"], *sample["prompt"], *sample["completion"]]
            rows[picture] = {**row, "completion": turns}
    return [*rows.values()]


def grpo(entered: Entered, made: type[PlainGRPO] = PlainGRPO) -> PlainGRPO:
    """The trainer of a GRPO stage, rewards drawn at random; KL to the disabled adapter, and to nothing else."""
    entered.processor.tokenizer.padding_side = "left"

    def drawn(completions: Any, **_: Any) -> list[float]:
        return [random.random() for _ in completions]

    trainer = made(
        model=entered.model,
        reward_funcs=[drawn],
        args=make_config(entered, {}),
        train_dataset=prompt_dataset(entered.samples),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
    )
    trainer.has_images = with_images(entered.samples)
    return trainer
