"""Supervised tuning of one stage with TRL's `SFTTrainer`.

accelerate launch --config_file recipes/accelerate/single.yaml pipeline/sft.py --recipe mini/sefe --stage 2
"""

from typing import Any

from datasets import Dataset
from torch.utils.data import Sampler
from trl import SFTConfig, SFTTrainer

from mcit.pipeline.arguments import make_config
from mcit.pipeline.collator import Collator
from mcit.pipeline.stage import Entered, main
from mcit.pipeline.trainer import GlobalBatchSampler, MethodLoss


class StageSFTTrainer(MethodLoss, SFTTrainer):
    """TRL's `SFTTrainer` on our global batches, its loss a mean over the tokens of the whole global batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Qwen-VL, Gemma and others declare that their own forward cannot take the number of tokens of the global batch.
        # TRL computes the loss itself, and can; without it each micro-batch would get the same weight whatever its
        # number of tokens, and the result would change with the number of devices.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        args = self.args
        global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        size = len(self.train_dataset)  # type: ignore[arg-type]
        return GlobalBatchSampler(size, global_batch, args.seed)


def make_trainer(entered: Entered) -> StageSFTTrainer:
    """The trainer of a stage: our collator on whole global batches, nothing packed or truncated."""
    own = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return StageSFTTrainer(
        model=entered.model,
        args=make_config(SFTConfig, entered, own),
        data_collator=Collator(entered.processor, entered.samples, entered.max_length),
        train_dataset=Dataset.from_dict({"index": list(range(len(entered.samples)))}),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
    )


if __name__ == "__main__":
    main("sft", make_trainer)
