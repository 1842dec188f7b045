"""The work of a run, counted from recipe and prepared data as training itself counts it."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mcit.data_prep.checks import TokenCounter
from mcit.data_prep.errors import InputError
from mcit.data_prep.prepare import image_path, prepare_task, read_images, read_samples, read_task
from mcit.data_prep.schema import Sample
from mcit.eval.cells import needed_cells
from mcit.eval.hashing import cache_dir

from ..methods import build_methods
from ..recipe.schedule import past_of, trained_in
from ..recipe.schema import Recipe, Stage
from ..training.arguments import split_batch
from ..training.batches import GlobalBatchSampler, by_kind, with_images
from ..training.collator import Collator
from ..training.replay import Replays


class StageWork(NamedTuple):
    """What a stage does."""

    samples: int  # its own, in one epoch
    steps: int  # of the optimizer
    seen: int  # samples that carry loss, over all steps, replayed ones included
    tokens: int  # of those, prompt, images and answer; RFT: of the prompts of all generations
    longest: int  # tokens of the longest sample
    micro_batch: int  # samples at most of one forward pass of one process
    generations: int  # RFT: completions that are generated; SFT: 0
    completion: int  # RFT: tokens at most of a completion; SFT: 0


class Answers(NamedTuple):
    """What evaluation asks."""

    cells: int
    answers: int
    tokens: int  # at most, if every answer is as long as it may be


@dataclasses.dataclass
class Prepared:
    """The prepared tasks of a recipe, with the tokens of each training sample."""

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

    def __init__(self, processor: Any, folder: Path):
        task = read_task(folder)
        super().__init__(processor, read_images(folder), lambda name: image_path(folder, task, name))
        self.collator = Collator(processor, [], sys.maxsize)

    def _text(self, sample: Sample) -> str:
        super()._text(sample)  # refuses placeholders
        return "".join(self.collator.pieces(sample))


def prepare(recipe: Recipe, processor: Any) -> Prepared:
    """Prepare the data in the cache, unless it is there, and count tokens. Raises `InputError`."""
    prepared = Prepared({}, {}, {})
    for task in recipe.sources:
        asd = None if task in recipe.anchors else recipe.asd
        home = Path(recipe.folder)
        folder = prepare_task(task, recipe.prepare, seed=recipe.seed, asd=asd, base_dir=home, cache=cache_dir())
        samples, lengths = read_samples(folder, "train"), dict[str, int]()
        for sample, tokens in _Trained(processor, folder).each(samples):
            if isinstance(tokens, InputError):
                raise InputError(str(tokens), where=task.name, field=f"train sample {sample['id']}")
            lengths[sample["id"]] = tokens
        prepared.folders[task.name], prepared.lengths[task.name] = folder, lengths
        prepared.samples[task.name] = samples
    return prepared


def stage_work(recipe: Recipe, stage: Stage, prepared: Prepared, processes: int, behind: int) -> StageWork:
    """Count a stage. `behind` are the stages before the recipe's own first. Raises `InputError`."""

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
    methods = build_methods(recipe.method, stage.train)
    general = [sample for anchor in recipe.anchors for sample in prepared.samples[anchor.name]]
    for method in methods:
        own = method.data(stage, own, past if method.keeps == "past data" else {}, {})
    replays = Replays(own, {method.name: wanted for method in methods if (wanted := method.replay(general))})
    lengths = [prepared.lengths[sample["task"]][sample["id"]] for sample in replays.samples]
    seed = (recipe.seed * 1_000_003 + behind + stage.k) % 2**31
    count = _sft if stage.train.paradigm == "sft" else _rft
    return count(stage, replays, lengths, processes, seed)


def answers(recipe: Recipe, prepared: Prepared) -> Answers:
    """Count what evaluation asks at the end."""
    cells = needed_cells(recipe.eval.cells, len(recipe.stages), recipe.learned)
    asked = sum(read_task(prepared.folders[task])["counts"]["test"] for _, task in cells)
    return Answers(len(list(cells)), asked, asked * recipe.eval.max_new_tokens)


def _sft(stage: Stage, replays: Replays, lengths: Sequence[int], processes: int, seed: int) -> StageWork:
    """The very batches that training draws, one after the other."""
    train, args = stage.train, stage.train.sft.args
    wanted = args.get("per_device_train_batch_size")
    per_device, _ = split_batch(train.global_batch_size, processes, wanted, replays.per_batch)
    drawn = list(replays.drawn.values())
    sampler = GlobalBatchSampler(replays.has_images, train.global_batch_size, per_device, processes, seed, drawn)
    steps = _steps(sampler.batches, args)
    seen = tokens = 0
    for epoch in range(-(-steps // sampler.batches)):
        sampler.set_epoch(epoch)
        left = min(sampler.batches, steps - epoch * sampler.batches) * sampler.micro_steps * processes
        for micro_batch, _ in zip(sampler, range(left), strict=False):
            seen += len(micro_batch.samples) if micro_batch.loss else 0
            tokens += sum(lengths[i] for i in micro_batch.samples)
    return StageWork(replays.own, steps, seen, tokens, max(lengths), per_device, 0, 0)


def _rft(stage: Stage, replays: Replays, lengths: Sequence[int], processes: int, seed: int) -> StageWork:
    """GRPO's generation batches, with TRL's defaults for what the recipe leaves out."""
    from trl import GRPOConfig  # here: takes seconds

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)}
    args = {**defaults, **stage.train.rft.args}
    batch = stage.train.global_batch_size
    per_device, _ = split_batch(batch, processes, stage.train.rft.args.get("per_device_train_batch_size"))
    generated = args["generation_batch_size"] or batch  # completions that are generated at once
    prompts = generated // args["num_generations"]
    own = replays.samples[: replays.own]
    batches = sum(-(-len(kind) // prompts) for kind in by_kind(range(replays.own), with_images(own)))
    per_epoch = batches * generated * args["num_iterations"] // batch
    steps = _steps(per_epoch, stage.train.rft.args)
    generations = -(-steps * batch // args["num_iterations"])
    mean = sum(lengths[: replays.own]) / replays.own
    longest, completion = max(lengths), args["max_completion_length"]
    tokens = round(generations * mean)
    return StageWork(replays.own, steps, steps * batch, tokens, longest, per_device, generations, completion)


def _steps(batches: int, args: dict[str, Any]) -> int:
    """Optimizer steps of `batches` an epoch, by transformers' rule."""
    if args.get("max_steps", -1) > 0:
        return int(args["max_steps"])
    return int(-(-batches * args.get("num_train_epochs", 3.0) // 1))
