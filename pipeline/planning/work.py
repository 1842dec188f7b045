"""The work of a run, counted from recipe and prepared data as training itself counts it."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from mcit.data_prep.checks import TokenCounter
from mcit.data_prep.errors import InputError
from mcit.data_prep.prepare import image_path, iter_samples, prepare_task, read_images, read_samples, read_task
from mcit.data_prep.schema import Sample
from mcit.eval.cells import needed_cells
from mcit.eval.config import JudgeConfig
from mcit.eval.constraints import constraint_of
from mcit.eval.hashing import cache_dir
from mcit.eval.judge.cells import reasons

from ..methods import Method
from ..recipe.schedule import past_of, trained_in
from ..recipe.schema import Phase, Recipe, Stage
from ..training.arguments import split_batch
from ..training.batches import by_kind, with_images
from ..training.collator import Collator
from ..training.replay import Replays
from .outlook import Outlook

_ANSWERS = 256  # of a stage's answers, at most, whose tokens are counted to know their mean


class StageWork(NamedTuple):
    """What a stage does."""

    samples: int  # its own, in one epoch
    steps: int  # of the optimizer
    seen: int  # samples that carry loss, over all steps, replayed ones included
    tokens: int  # of those, prompt, images and answer; RFT: of the prompts of all generations
    places: int  # SFT: of its batches, those included that fill up what is shorter than the longest; RFT: 0
    longest: int  # tokens of the longest sample
    micro_batch: int  # samples at most of one forward pass of one process
    accumulates: bool  # whether a process sums gradients over several of them
    generations: int  # RFT: completions that are generated; SFT: 0
    at_once: int  # RFT: of these, by one process at a time
    completion: int  # RFT: tokens at most of a completion; SFT: 0


class Answers(NamedTuple):
    """What evaluation asks."""

    answers: int
    again: int  # questions that are asked in other ways too, at most
    tokens: int  # of all answers, if every one is as long as it may be


class Judged(NamedTuple):
    """What a judge is asked, if every answer has reasoning, and each of its replies is a verdict."""

    questions: int
    tokens: int | None  # of its replies, at most; None: the recipe sets no limit


@dataclasses.dataclass
class Prepared:
    """The prepared tasks of a recipe, with the tokens of each training sample."""

    collator: Collator
    folders: dict[str, Path]
    lengths: dict[str, dict[str, int]]  # task → sample id → tokens
    samples: dict[str, list[Sample]]

    @property
    def bytes(self) -> int:
        """Size of the prepared data on disk."""
        return sum(
            file.stat().st_size for folder in self.folders.values() for file in folder.rglob("*") if file.is_file()
        )


class _Trained(TokenCounter):
    """Counts the tokens that training sees: the dialogue as the collator cuts it, nothing behind the last answer."""

    def __init__(self, collator: Collator, folder: Path):
        task = read_task(folder)
        super().__init__(collator.processor, read_images(folder), lambda name: image_path(folder, task, name))
        self.collator = collator

    def _text(self, sample: Sample) -> str:
        super()._text(sample)  # refuses placeholders
        return "".join(self.collator.pieces(sample))


def prepare(recipe: Recipe, processor: Any) -> Prepared:
    """Prepare the data in the cache, unless it is there, and count tokens. Raises `InputError`."""
    prepared = Prepared(Collator(processor, [], sys.maxsize), {}, {}, {})
    for task in recipe.sources:
        asd = None if task in recipe.anchors else recipe.asd
        home = Path(recipe.folder)
        folder = prepare_task(task, recipe.prepare, seed=recipe.seed, asd=asd, base_dir=home, cache=cache_dir())
        samples, lengths = read_samples(folder, "train"), dict[str, int]()
        for sample, tokens in _Trained(prepared.collator, folder).each(samples):
            if isinstance(tokens, InputError):
                raise InputError(str(tokens), where=task.name, field=f"train sample {sample['id']}")
            lengths[sample["id"]] = tokens
        prepared.folders[task.name], prepared.lengths[task.name] = folder, lengths
        prepared.samples[task.name] = samples
    return prepared


def stage_work(
    recipe: Recipe, outlook: Outlook, phase: Phase, methods: Sequence[Method], prepared: Prepared, processes: int
) -> tuple[StageWork, Outlook]:
    """Count a phase of a stage; also what is known of it then. Raises `InputError`."""
    stage = outlook.stage

    def trained(stage: Stage) -> list[Sample]:
        return [
            sample
            for name in (*stage.tasks, *stage.visitors)
            for sample in trained_in(
                prepared.samples[name], stage.k, recipe.homes(name), len(recipe.stages), recipe.blur, recipe.seed
            )
        ]

    own = trained(stage)
    past = past_of(recipe.stages, stage.k, own, trained)
    general = [sample for anchor in recipe.anchors for sample in prepared.samples[anchor.name]]
    for method in methods:
        own = method.data(stage, own, past if method.keeps == "past data" else {}, _StateToCome())
    replays = Replays(own, {method.name: wanted for method in methods if (wanted := method.replay(general))})
    lengths = [prepared.lengths[sample["task"]][sample["id"]] for sample in replays.samples]
    seed = (recipe.seed * 1_000_003 + outlook.stages) % 2**31
    count = _sft if phase == "sft" else _rft
    work = count(stage, replays, lengths, processes, seed)
    kept = [prepared.lengths[sample["task"]][sample["id"]] for sample in general]
    return work, dataclasses.replace(
        outlook,
        processes=processes,
        samples=work.samples,
        steps=work.steps,
        micro_batch=work.micro_batch,
        tokens=work.tokens,
        length=mean(lengths[: work.samples]),
        answer=mean(_answer_tokens(prepared.collator, own[:_ANSWERS])),
        general=len(kept),
        general_length=mean(kept) if kept else 0.0,
    )


class _StateToCome(dict[str, Any]):
    """The state that a method will have by then, of which it is only asked whether it has something: it has."""

    def __contains__(self, key: object) -> bool:
        return True


def _answer_tokens(collator: Collator, samples: Sequence[Sample]) -> Iterator[int]:
    """Of each sample, the tokens that carry loss."""
    for sample in samples:
        text = "".join(collator.pieces(sample)[1::2])
        yield len(collator.tokenizer(text, add_special_tokens=False)["input_ids"])


def answers(recipe: Recipe, prepared: Prepared) -> Answers:
    """Count what evaluation asks at the end."""
    general = tuple(task.name for task in recipe.eval.general)
    cells = [name for _, name in needed_cells(recipe.eval.cells, len(recipe.stages), recipe.learned, general)]
    counts = {name: _asked(recipe, prepared.folders[name]) for name in dict.fromkeys(cells)}
    asked, again = (sum(counts[name][i] for name in cells) for i in (0, 1))
    return Answers(asked, again, (asked + again) * recipe.eval.max_new_tokens)


def _asked(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """Of one cell: the questions, and how many are asked in other ways too."""
    choices, samples = read_task(folder).get("choices"), read_samples(folder, "test")
    held = [sample for sample in samples if recipe.eval.constrained and constraint_of(sample, choices)]
    pictured = sum(bool(sample["images"]) for sample in samples)
    return len(samples), len(held) + 2 * min(recipe.eval.image_probe or 0, pictured)  # other images, and grey ones


def judged(recipe: Recipe, prepared: Prepared) -> Judged | None:
    """Count what a judge is asked; None where the recipe names no model for it."""
    judge, questions = recipe.eval.judge, 0
    if not isinstance(judge, JudgeConfig):
        return None
    for _, name in needed_cells(recipe.eval.cells, len(recipe.stages), recipe.learned):
        if reasons(read_task(prepared.folders[name])):
            there = sum(sample["reasoning"] == "think" for sample in iter_samples(prepared.folders[name], "test"))
            questions += min(there, judge.samples or there)
    limit = judge.request.get("max_completion_tokens") or judge.request.get("max_tokens")
    return Judged(questions, questions * int(limit) if limit else None)


def _sft(stage: Stage, replays: Replays, lengths: Sequence[int], processes: int, seed: int) -> StageWork:
    """The very batches that training draws, one after the other."""
    args, sampler = stage.train.sft.args, replays.batches(stage.train, lengths, processes, seed)
    steps = _steps(sampler.batches, args)
    seen = tokens = places = 0
    for epoch in range(-(-steps // sampler.batches)):
        sampler.set_epoch(epoch)
        left = min(sampler.batches, steps - epoch * sampler.batches) * sampler.micro_steps * processes
        for micro_batch, _ in zip(sampler, range(left), strict=False):
            seen += len(micro_batch.samples) if micro_batch.loss else 0
            taken = [lengths[i] for i in micro_batch.samples]
            tokens, places = tokens + sum(taken), places + len(taken) * max(taken)
    accumulates = sampler.micro_steps > 1
    return StageWork(replays.own, steps, seen, tokens, places, max(lengths), sampler.per_device, accumulates, 0, 0, 0)


def _rft(stage: Stage, replays: Replays, lengths: Sequence[int], processes: int, seed: int) -> StageWork:
    """GRPO's generation batches, with TRL's defaults for what the recipe leaves out."""
    from trl import GRPOConfig  # here: takes seconds

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    args = {**defaults, **stage.train.rft.args}
    batch = stage.train.batch_size("rft")
    per_device, accumulated = split_batch(batch, processes, stage.train.rft.args.get("per_device_train_batch_size"))
    generated = args["generation_batch_size"] or batch  # completions that are generated at once
    prompts = generated // args["num_generations"]
    own = replays.samples[: replays.own]
    batches = sum(-(-len(kind) // prompts) for kind in by_kind(range(replays.own), with_images(own)))
    per_epoch = batches * generated * args["num_iterations"] // batch
    steps = _steps(per_epoch, stage.train.rft.args)
    generations = -(-steps * batch // args["num_iterations"])
    return StageWork(
        samples=replays.own,
        steps=steps,
        seen=steps * batch,
        tokens=round(generations * mean(lengths[: replays.own])),
        places=0,
        longest=max(lengths),
        micro_batch=per_device,
        accumulates=accumulated > 1,
        generations=generations,
        at_once=-(-generated // processes),
        completion=args["max_completion_length"],
    )


def _steps(batches: int, args: dict[str, Any]) -> int:
    """Optimizer steps of `batches` an epoch, by transformers' rule."""
    if args.get("max_steps", -1) > 0:
        return int(args["max_steps"])
    return int(-(-batches * args.get("num_train_epochs", 3.0) // 1))
