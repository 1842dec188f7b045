"""Supervised tuning of one stage with TRL's `SFTTrainer`.

accelerate launch --config_file recipes/accelerate/single.yaml pipeline/sft.py --recipe mini/sefe --stage 2
"""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl import SFTTrainer

from mcit.pipeline.stage.entering import Entered
from mcit.pipeline.stage.stage import main
from mcit.pipeline.training.arguments import make_config, processes
from mcit.pipeline.training.batches import GlobalBatchSampler, MicroBatches
from mcit.pipeline.training.collator import IGNORED, Collator
from mcit.pipeline.training.head import labels_alone
from mcit.pipeline.training.packing import read_packed
from mcit.pipeline.training.trainer import MethodLoss


class StageSFTTrainer(MethodLoss, SFTTrainer):
    """TRL's `SFTTrainer` on our global batches, its loss a mean over the tokens of the whole global batch."""

    def __init__(self, sampler: GlobalBatchSampler, **kwargs: Any):
        self.sampler = sampler
        self.places = 0  # of this process's batches, those included that only fill them up
        super().__init__(**kwargs)
        # Qwen-VL, Gemma and others declare that their own forward cannot take the number of tokens of the global batch.
        # TRL computes the loss itself, and can; without it each micro-batch would get the same weight whatever its
        # number of tokens, and the result would change with the number of devices.
        self.model_accepts_loss_kwargs = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader whose items are whole micro-batches, dealt to the processes in turn."""
        return self._get_dataloader(
            dataset=MicroBatches(self.sampler),
            description="Training",
            batch_size=1,
            sampler_fn=lambda _: self.sampler,
            is_training=True,
        )

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See `MethodLoss`."""
        self.places += inputs["input_ids"].numel()
        with labels_alone():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Also what batches held, beside TRL's `num_tokens`: what went through the model where nothing is packed."""
        places = torch.tensor(self.places, device=self.args.device)
        logs["num_places"] = int(self.accelerator.reduce(places, "sum").item())
        super().log(logs, start_time)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Samples, of which a loader's item holds several."""
        return self.sampler.own

    def share(self, inputs: Any) -> float:
        """See `StepView.share`."""
        learned = (inputs["labels"] != IGNORED).any(1).sum().item()
        return learned * self.args.world_size / self.sampler.global_batch_size


def make_trainer(entered: Entered) -> StageSFTTrainer:
    """The trainer of a stage: our collator on whole global batches, nothing truncated, nothing packed by TRL.

    Replayed samples are in the same micro-batches: rows know nothing of each other, and a forward pass is saved.
    """
    train, replays = entered.stage.train, entered.replays
    sampler = replays.batches(train, entered.lengths, processes(), entered.seed)
    packed = read_packed(entered.model) if train.packing else None
    own = {
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "per_device_train_batch_size": sampler.per_device,
        "gradient_accumulation_steps": sampler.micro_steps,
    }
    return StageSFTTrainer(
        sampler,
        model=entered.model,
        args=make_config(entered, own),
        data_collator=Collator(entered.processor, replays.samples, entered.max_length, own=replays.own, packed=packed),
        train_dataset=Dataset.from_dict({"index": list(range(replays.own))}),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
    )


if __name__ == "__main__":
    main("sft", make_trainer)
