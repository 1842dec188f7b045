"""Reinforcement tuning of one stage with TRL's `GRPOTrainer`; rewards are the evaluation's own scorers.

accelerate launch --config_file recipes/accelerate/single.yaml pipeline/rft.py --recipe R --stage 1
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mcit.data_prep.chat import open_image, to_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.schema import PreparedTask, Sample
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import Score, score_response
from mcit.pipeline.arguments import make_config
from mcit.pipeline.batches import GroupSampler, check_prompts, with_images
from mcit.pipeline.lineage import set_reference
from mcit.pipeline.methods import StepView
from mcit.pipeline.replay import Pass
from mcit.pipeline.stage import Entered, main
from mcit.pipeline.trainer import MethodLoss

# Nats per token; the previous policy is the entering one, so only rounding may separate them.
KL_AT_START = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


class StageGRPOTrainer(MethodLoss, GRPOTrainer):
    """TRL's `GRPOTrainer` with the methods' terms, on generation batches that are with images or without.

    Replayed samples are in forward passes of their own, in the last micro-step: TRL's batches are prompts and what was
    generated.
    """

    def __init__(self, has_images: Sequence[bool], **kwargs: Any):
        self.has_images = has_images
        super().__init__(**kwargs)

    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        args: Any = self.args
        self.sampler = GroupSampler(
            self.has_images,
            prompts=args.generation_batch_size // args.num_generations,
            group=args.num_generations,
            repeats=self.num_iterations * args.steps_per_generation,
            seed=args.seed,
        )
        return self.sampler

    def between_batches(self) -> bool:
        """Whether everything that was generated has been learned from: checkpoints hold no rollouts."""
        args: Any = self.args
        return self._step % (args.steps_per_generation * self.num_iterations) == 0

    def apart(self, view: StepView) -> Iterator[Pass]:
        """The replayed samples of this optimizer step."""
        if view.last and self.replays.drawn:
            yield from self.passes(view.model, self.replays.of(view.step, self.args.seed))


def make_trainer(entered: Entered) -> StageGRPOTrainer:
    """The trainer of a stage: transformers generation, one reward per sample's task, an explicit KL reference."""
    train = entered.stage.train
    entered.processor.tokenizer.padding_side = "left"  # generation; right padding corrupts Qwen's positions
    rewards = {name: weight for name, weight in train.rft.rewards.items() if weight}
    args = make_config(GRPOConfig, entered, {"reward_weights": list(rewards.values())})
    prompts = args.generation_batch_size // args.num_generations
    has_images = with_images(entered.samples)
    check_prompts(has_images, prompts, entered.stage.name)
    trainer = StageGRPOTrainer(
        has_images,
        model=entered.model,
        reward_funcs=reward_functions(entered.tasks, list(rewards), _end_tokens(entered)),
        args=args,
        train_dataset=prompt_dataset(entered.samples),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
    )
    trainer.add_callback(RewardsDiffer(entered.stage.name))
    if args.beta:
        set_reference(entered.model, entered.previous, train)
        if train.reference == "previous":
            trainer.add_callback(ReferenceIsPrevious(KL_AT_START[entered.recipe.base_model.dtype]))
    return trainer


def prompt_dataset(samples: Sequence[Sample]) -> Dataset:
    """Rows of `prompt` (the chat that evaluation renders), `sample` and, if there are any, `images`, opened late.

    Rows that are asked for together have images or have none (`GroupSampler`).
    """

    def rows(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        chosen = [samples[i] for i in batch["index"]]
        columns: dict[str, list[Any]] = {
            "prompt": [to_chat(sample["prompt"], len(sample["images"])) for sample in chosen],
            "sample": chosen,
        }
        if chosen[0]["images"]:
            columns["images"] = [[open_image(path) for path in sample["images"]] for sample in chosen]
        return columns

    return Dataset.from_dict({"index": list(range(len(samples)))}).with_transform(rows)


def reward_functions(tasks: Mapping[str, PreparedTask], names: Sequence[str], end_tokens: set[int]) -> list[Any]:
    """The rewards `names` in [0, 1], each by the scorer of the sample's own task, as TRL calls them.

    `accuracy` is the evaluation's score, so an answer in the wrong form earns none; `format` is 1 for the right form.
    """
    scorers = {
        name: get_scorer(task["scorer"] if task["reward"] == "same" else task["reward"]) for name, task in tasks.items()
    }

    def scores(completions: Any, completion_ids: Any, sample: Sequence[Sample]) -> list[Score]:
        return [
            score_response(row, completion[0]["content"], scorers[row["task"]], bool(ids) and ids[-1] in end_tokens)
            for row, completion, ids in zip(sample, completions, completion_ids, strict=True)
        ]

    def accuracy(completions: Any, completion_ids: Any, sample: Sequence[Sample], **_: Any) -> list[float]:
        return [score["score"] / 100 for score in scores(completions, completion_ids, sample)]

    def format(completions: Any, completion_ids: Any, sample: Sequence[Sample], **_: Any) -> list[float]:
        return [float(score["format_ok"]) for score in scores(completions, completion_ids, sample)]

    known = {"accuracy": accuracy, "format": format}
    return [known[name] for name in names]


class ReferenceIsPrevious(TrainerCallback):
    """At the first step the KL to the previous policy must vanish: anything else is a wrong reference."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kl = (logs or {}).get("kl")
        if state.global_step == 1 and kl is not None and not abs(kl) < self.limit:
            raise RuntimeError(f"the first KL to the previous policy is {kl}, not 0: the reference is another policy")


class RewardsDiffer(TrainerCallback):
    """Refuses a training in which no reward ever differed within a group: every advantage was zero."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alike = [row["frac_reward_zero_std"] for row in state.log_history if "frac_reward_zero_std" in row]
        if alike and min(alike) == 1:
            rewards = [row["reward"] for row in state.log_history if "reward" in row]
            raise InputError(
                f"all answers to a prompt always earned the same reward ({min(rewards):g} to {max(rewards):g}), so "
                "nothing was learned",
                where=f"stage {self.stage}",
                field="train.rft",
                remedy="Check the reward, or raise args.temperature or args.num_generations",
            )


def _end_tokens(entered: Entered) -> set[int]:
    """What ends a completion, by TRL's own rule: the model's end tokens and the tokenizer's."""
    declared = entered.model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return {token for token in [*ids, entered.processor.tokenizer.eos_token_id] if token is not None}


if __name__ == "__main__":
    main("rft", make_trainer)
