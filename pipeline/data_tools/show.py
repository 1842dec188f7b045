"""What the model really gets of a stage's data: text, images, tokens, and which of them carry loss."""

import sys
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from mcit.data_prep.chat import open_image
from mcit.data_prep.errors import InputError
from mcit.data_prep.prepare import image_path, prepare_task, read_samples, read_task
from mcit.data_prep.schema import AsdConfig, PreparedTask, Sample
from mcit.eval.hashing import cache_dir, hub_commit
from mcit.eval.scorers import get_scorer
from mcit.eval.scoring import Score, score_gold

from ..recipe.schedule import trained_in
from ..recipe.schema import ModelConfig, Recipe
from ..run.terminal import Terminal


class Span(NamedTuple):
    """Neighbouring tokens that all carry loss, or none of them."""

    text: str  # runs of image tokens shortened to one and their number
    tokens: int
    loss: bool


class Shown(NamedTuple):
    """A training sample as the model gets it."""

    sample: Sample
    spans: list[Span]
    images: list[tuple[str, tuple[int, int], int | None]]  # path, (width, height) in pixels, tokens
    native: Sample | None  # the sample before ASD, if ASD changed it
    gold: Score  # what the gold answer scores
    visits: bool  # whether its task is not one of the stage's own (`blur`)


def read_stage(recipe: Recipe, k: int, n: int) -> list[Shown]:
    """`n` of the samples that stage `k` trains of each task, half of them converted ones if ASD acts.

    The stage's own tasks come first, then those of which samples visit it. Data are prepared if need be. Raises
    `InputError`.
    """
    from ..training.collator import Collator  # here: it needs torch and transformers

    if not 1 <= k <= len(recipe.stages):
        raise InputError(f"the stream has stages 1 to {len(recipe.stages)}", where=recipe.name, field="--stage")
    stage = recipe.stages[k - 1]
    processor, shown = _processor(recipe.base_model), []
    for name in (*stage.tasks, *stage.visitors):
        folder, task, every = _prepared(recipe, name, recipe.asd)
        samples = trained_in(every, k, recipe.homes(name), len(recipe.stages), recipe.blur, recipe.seed)
        native = {sample["id"]: sample for sample in _prepared(recipe, name, None)[2]} if recipe.asd else {}
        converted = [sample for sample in samples if "asd" in sample.get("meta", {})][: (n + 1) // 2]
        rest = [sample for sample in samples if sample not in converted][: n - len(converted)]
        collator = Collator(processor, [], stage.train.max_length or sys.maxsize)
        for sample in [*converted, *rest]:
            paths = [str(image_path(folder, task, image)) for image in sample["images"]]
            placed: Sample = {**sample, "images": paths}
            before = native.get(sample["id"]) if sample in converted else None
            reward = "rft" in stage.train.phases and task["reward"] != "same"
            scorer = get_scorer(task["reward"] if reward else task["scorer"])
            gold = score_gold(sample, scorer)
            spans, images = _as_the_model_gets_it(placed, collator, processor)
            shown.append(Shown(placed, spans, images, before, gold, name in stage.visitors))
    return shown


def show_stage(recipe: Recipe, k: int, n: int, terminal: Terminal) -> None:
    """Print `n` of the samples that stage `k` trains of each task.

    Tokens with loss are coloured, or [[marked]] without a terminal.
    """
    samples = read_stage(recipe, k, n)
    learned = "with loss"
    if recipe.stages[k - 1].train.paradigm == "rft":
        learned = "of the gold answer, which GRPO does not train on"
    for shown in samples:
        sample, spans = shown.sample, shown.spans
        trained = sum(span.tokens for span in spans if span.loss)
        total = sum(span.tokens for span in spans)
        visits = " · visits this stage" if shown.visits else ""
        title = f"── {sample['task']} {sample['id']}{visits} · {sample['style']} · {total} tokens, {trained} {learned}"
        terminal.say(title, "bold")
        for path, (width, height), tokens in shown.images:
            terminal.say(f"image {path}  {width}×{height}" + (f", {tokens} tokens" if tokens is not None else ""))
        if shown.native:
            terminal.say("before ASD:", "dim")
            for message in [*shown.native["prompt"], *shown.native["completion"]]:
                terminal.say(f"  {message['role']}: {message['content']}", "dim")
            terminal.say("after ASD, as the model gets it:", "dim")
        terminal.console.print(_text(spans, terminal.console.is_terminal))
        terminal.say(f"the gold answer scores {shown.gold['score']:.1f} ({shown.gold['verdict']})", "dim")


def _processor(base: ModelConfig) -> Any:
    """The base model's processor. Raises `InputError` if it cannot be had."""
    from ..stage.entering import load_processor  # here: it needs torch and transformers

    if not Path(base.path).is_dir():
        hub_commit(base.path, base.revision)
    try:
        return load_processor(base)
    except (OSError, ValueError) as error:
        problem = f"its processor cannot be loaded: {error}"
        raise InputError(
            problem, where=base.path, field="base_model", remedy="Give the folder of a saved model"
        ) from None


def _prepared(recipe: Recipe, name: str, asd: AsdConfig | None) -> tuple[Path, PreparedTask, list[Sample]]:
    home, task = Path(recipe.folder), recipe.task(name)
    folder = prepare_task(task, recipe.prepare, seed=recipe.seed, asd=asd, base_dir=home, cache=cache_dir())
    return folder, read_task(folder), read_samples(folder, "train")


def _as_the_model_gets_it(
    sample: Sample, collator: Any, processor: Any
) -> tuple[list[Span], list[tuple[str, tuple[int, int], int | None]]]:
    """The spans of a sample's tokens, and its images (see `Shown`)."""
    from ..training.collator import IGNORED

    batch = collator.collate([sample])
    tokens = list(zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True))
    image_token = getattr(processor, "image_token_id", None)
    spans, runs = [], []
    for loss, group in groupby(tokens, key=lambda token: token[1] != IGNORED):
        ids, text = [token for token, _ in group], ""
        for is_image, run in groupby(ids, key=lambda token: token == image_token):
            part = list(run)
            runs += [len(part)] if is_image else []
            text += processor.tokenizer.decode(part[:1] if is_image else part) + (f"×{len(part)}" if is_image else "")
        spans.append(Span(text, len(ids), loss))
    counts = runs if len(runs) == len(sample["images"]) else [None] * len(sample["images"])
    images = [(path, open_image(path).size, count) for path, count in zip(sample["images"], counts, strict=True)]
    return spans, images


def _text(spans: list[Span], colour: bool) -> Text:
    """The spans as one text, those with loss set off."""
    return Text.assemble(
        *(
            (span.text, "bold green") if colour and span.loss else f"[[{span.text}]]" if span.loss else span.text
            for span in spans
        )
    )
