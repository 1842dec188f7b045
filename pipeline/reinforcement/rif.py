"""Which samples a policy can learn from by rewards: found by trying, before a stage (RIF-RFT, arXiv 2507.05386)."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object, set_seed
from trl.data_utils import prepare_multimodal_messages

from mcit.data_prep.chat import open_image, to_chat
from mcit.data_prep.errors import InputError
from mcit.data_prep.files import hash_json, read_json, write_json
from mcit.data_prep.schema import Sample
from mcit.eval.hashing import cache_dir
from mcit.eval.scoring import scorers_of

from ..policy.quantization import quantised
from ..stage.entering import Entered
from ..training.batches import by_kind, with_images
from .config import RifConfig
from .rewards import Rewards
from .rollouts import Engine

# Of TRL's arguments, those that decide what is drawn.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length", "seed")


def learnable(entered: Entered, engine: Engine, rewards: Rewards, trainer: Any) -> tuple[list[Sample], dict[str, Any]]:
    """The samples of a stage that are worth rollouts, and a report; all processes call it together.

    What the policy makes of them is kept in the cache, under the hash of policy, data and sampling. Raises `InputError`
    where nothing is left.
    """
    config = entered.stage.train.rft.rif
    assert config is not None
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    if plugin is not None and plugin.zero_stage == 3 and engine.name == "transformers":
        remedy = "Use zero2, or a vLLM server (train.rft.rollout.engine: server)"
        raise InputError("does not run under zero3", where="recipe", field="train.rft.rif", remedy=remedy)
    found = {f"{sample['task']} {sample['id']}": i for i, sample in enumerate(entered.samples)}
    if len(found) < len(entered.samples):
        raise InputError("a sample occurs twice in the stage", where="recipe", field="train.rft.rif")
    file = cache_dir() / "rif" / f"{hash_json(_provenance(entered, config, trainer.args))}.json"
    cached = broadcast_object_list([read_json(file) if file.exists() else None])[0]
    accuracy: dict[str, list[float]] = cached or _try(entered, config.rollouts, engine, rewards, trainer, file)
    kept = [entered.samples[i] for name, i in found.items() if keeps(accuracy[name], config)]
    if not kept:
        mean = sum(map(sum, accuracy.values())) / sum(map(len, accuracy.values()))
        raise InputError(
            f"the entering policy leaves nothing to learn: its answers' mean accuracy is {100 * mean:.1f}",
            where=f"stage {entered.stage.name}",
            field="train.rft.rif",
            remedy="Teach it by SFT first (train.paradigm: sft+rft), or leave train.rft.rif out",
        )
    every, left = (Counter(sample["task"] for sample in samples) for samples in (entered.samples, kept))
    shares = {task: round(left[task] / count, 4) for task, count in every.items()}
    return kept, {"samples": len(found), "kept": len(kept), "share": shares, "cached": cached is not None}


def keeps(accuracy: Sequence[float], config: RifConfig) -> bool:
    """Whether a sample whose answers earned `accuracy`, each in [0, 1], is one to learn from."""
    right = [value > config.threshold for value in accuracy]
    return any(right) and (config.keep == "competent" or not all(right))


def _provenance(entered: Entered, config: RifConfig, args: Any) -> dict[str, Any]:
    """All that the tries depend on; which samples they then keep is decided anew each time."""
    before, half = entered.before, entered.entry.half
    return {
        "base": before.model_dump(include={"base_hash", "dtype", "processor"}),
        "policy": before.base_hash if entered.enters_base else before.hash,
        "half": read_json(half / "trained.json")["hash"] if half else None,
        "data": {name: task["train_hash"] for name, task in entered.tasks.items()},
        "samples": hash_json([[sample["task"], sample["id"]] for sample in entered.samples]),
        "scorers": {name: scorers_of(task) for name, task in entered.tasks.items()},
        "rollouts": config.rollouts,
        "sampling": {name: getattr(args, name) for name in _SAMPLING},
        **quantised(entered.recipe.base_model),
    }


def _try(
    entered: Entered, rollouts: int, engine: Engine, rewards: Rewards, trainer: Any, file: Path
) -> dict[str, list[float]]:
    """The accuracy of `rollouts` answers to each sample, by task and id; each process asks its part of them."""
    accelerator = trainer.accelerator
    trainer.model.to(accelerator.device)
    training = trainer.model.training
    rows = max(1, trainer.args.generation_batch_size // accelerator.num_processes // rollouts)
    mine: dict[str, list[float]] = {}
    for batch in _batches(entered.samples, rows, accelerator.process_index, accelerator.num_processes):
        samples = [sample for sample in batch for _ in range(rollouts)]
        drawn = engine.draw([_prompt(sample) for sample in samples], samples, trainer)
        texts = trainer.processing_class.batch_decode(drawn.completion_ids, skip_special_tokens=True)
        scores = rewards.scores(samples, texts, drawn.completion_ids)
        for sample, score in zip(samples, scores, strict=True):
            mine.setdefault(f"{sample['task']} {sample['id']}", []).append(score["score"] / 100)
    trainer.model.train(training)
    accuracy = {name: values for part in gather_object([mine]) for name, values in part.items()}
    if accelerator.is_main_process:
        write_json(file, accuracy)
    set_seed(trainer.args.seed, device_specific=True)  # as TRL left it: training does not depend on what is cached
    return accuracy


def _batches(samples: Sequence[Sample], rows: int, process: int, processes: int) -> Iterator[list[Sample]]:
    """A process's part of the samples, `rows` of one kind at a time, images in one and none in the other."""
    for kind in by_kind(range(len(samples)), with_images(samples)):
        part = kind[process::processes]
        for start in range(0, len(part), rows):
            yield [samples[i] for i in part[start : start + rows]]


def _prompt(sample: Sample) -> Any:
    """A sample's prompt as TRL has it when it generates."""
    chat = to_chat(sample["prompt"], len(sample["images"]))
    pictures = [open_image(path) for path in sample["images"]]
    return prepare_multimodal_messages(chat, images=pictures) if pictures else chat
