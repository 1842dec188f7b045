"""Reinforcement tuning of one stage with TRL's `GRPOTrainer`; rewards are the evaluation's own scorers.

accelerate launch --config_file recipes/accelerate/single.yaml pipeline/rft.py --recipe R --stage 1
"""

from typing import Any

from transformers import TrainerCallback

from mcit.pipeline.reinforcement.groups import check_whole_groups
from mcit.pipeline.reinforcement.guard import Guard
from mcit.pipeline.reinforcement.prompts import check_roles, prompt_dataset
from mcit.pipeline.reinforcement.references import References
from mcit.pipeline.reinforcement.rewards import Rewards, RewardsDiffer
from mcit.pipeline.reinforcement.rif import learnable
from mcit.pipeline.reinforcement.rollouts import Engine, Rollouts, TransformersEngine, check_groups
from mcit.pipeline.reinforcement.trainer import StageGRPOTrainer
from mcit.pipeline.stage.entering import Entered
from mcit.pipeline.stage.stage import main
from mcit.pipeline.training.arguments import make_config
from mcit.pipeline.training.batches import check_prompts, with_images
from mcit.pipeline.training.packing import read_packed

# Nats per token; the previous policy is the entering one, so only rounding may separate them.
KL_AT_START = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


def make_trainer(entered: Entered) -> StageGRPOTrainer:
    """The trainer of a stage: one reward per sample's task, an explicit KL reference, rollouts as the recipe says."""
    train = entered.stage.train
    section, tries = train.rft, train.rft.rollout.resample
    entered.processor.tokenizer.padding_side = "left"  # generation; right padding corrupts Qwen's positions
    check_roles(entered.samples, entered.processor)
    rewards = Rewards(entered.tasks, section.rewards, _end_tokens(entered))
    # TRL is told of no KL: `StageGRPOTrainer` weighs it.
    own: dict[str, Any] = {"reward_weights": list(rewards.weights.values()), "beta": 0.0}
    if section.algorithm == "rloo":
        own["scale_rewards"] = "none"
    args = make_config(entered, own)
    prompts = args.generation_batch_size // args.num_generations
    has_images = with_images(entered.samples)
    check_prompts(has_images, prompts, entered.stage.name)
    per_process = args.per_device_train_batch_size * args.steps_per_generation
    check_groups(per_process, args.num_generations, tries)
    if train.packing:
        check_whole_groups(args.per_device_train_batch_size, per_process, args.num_generations)
    references, engine = References(entered), _engine(entered)
    rollouts = Rollouts(engine, rewards, tries)
    trainer = StageGRPOTrainer(
        has_images,
        references,
        train.reference,
        beta=section.args.get("beta", 0.0),
        leave_one_out=section.algorithm == "rloo",
        tolerance=section.rollout.tolerance,
        packed=read_packed(entered.model) if train.packing else None,
        model=entered.model,
        reward_funcs=rewards.functions,
        args=args,
        train_dataset=prompt_dataset(entered.samples),
        processing_class=entered.processor,
        callbacks=entered.callbacks,
        rollout_func=rollouts if tries or engine.name != "transformers" else None,
    )
    references.load(trainer)
    trainer.notes.append(lambda: {"rollouts": {"engine": engine.name, **engine.report(), **rollouts.report()}})
    if section.rif:
        kept, report = learnable(entered, engine, rewards, trainer)
        check_prompts(with_images(kept), prompts, entered.stage.name)
        trainer.keep(kept)
        trainer.notes.append(lambda: {"rif": report})
    if section.guard:
        guard = Guard(section.guard, entered.model)
        trainer.add_callback(guard)
        trainer.stateful["guard"] = guard
        trainer.notes.append(lambda: {"collapse": guard.collapse})
    trainer.stateful["rewards"] = rewards
    trainer.add_callback(RewardsDiffer(entered.stage.name, rewards))
    trainer.add_callback(BeginsAtPrevious(KL_AT_START[entered.recipe.base_model.dtype]))
    trainer.add_callback(Closes(engine))
    return trainer


def _engine(entered: Entered) -> Engine:
    """What answers. vLLM is imported only where it is asked for."""
    name = entered.stage.train.rft.rollout.engine
    if name == "vllm":
        from mcit.pipeline.reinforcement.vllm_engine import VllmRollouts

        return VllmRollouts(entered)
    if name == "server":
        from mcit.pipeline.reinforcement.server import ServerRollouts

        return ServerRollouts(entered)
    return TransformersEngine()


class Closes(TrainerCallback):
    """Closes the engine when training ends."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.engine.close()


class BeginsAtPrevious(TrainerCallback):
    """At the first step the KL to the previous policy must vanish: anything else is a wrong reference."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        kl = (logs or {}).get("kl_previous")
        if state.global_step == 1 and kl is not None and not abs(kl) < self.limit:
            raise RuntimeError(f"the first KL to the previous policy is {kl}, not 0: the reference is another policy")


def _end_tokens(entered: Entered) -> set[int]:
    """What ends a completion, by TRL's own rule: the model's end tokens and the tokenizer's."""
    declared = entered.model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return {token for token in [*ids, entered.processor.tokenizer.eos_token_id] if token is not None}


if __name__ == "__main__":
    main("rft", make_trainer)
