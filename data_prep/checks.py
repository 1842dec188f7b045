"""Does every prepared sample fit a model: image placeholders and exact tokens, counted without building pixels."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .chat import open_image, render_chat, tokenizer_options
from .errors import InputError
from .images import ImageFacts
from .prepare import drop_samples, image_path, iter_samples, read_images, read_task
from .readers import PARTS, Part
from .schema import Sample

_BATCH = 256  # texts tokenized at once


class Lengths(NamedTuple):
    """Tokens of a part's samples, prompt and completion with images expanded."""

    samples: int
    max: int
    mean: float
    longest: str  # the id of a sample with `max` tokens


class Fit(NamedTuple):
    """Lengths by part, why which samples (by part and id) do not fit, and the tokens of each that trains, by id."""

    lengths: dict[Part, Lengths]
    bad: dict[Part, dict[str, str]]
    tokens: dict[str, int]


def check_samples(
    path: Path,
    processor: Any,
    max_length: int | None,
    max_model_len: int | None = None,
    context: int | None = None,
    *,
    on_bad: Literal["error", "drop"] = "error",
) -> Fit:
    """Count every sample's tokens as the model will get them.

    `processor` is a transformers processor with a chat template; `max_length` is what fits in training and
    `max_model_len` in evaluation, in tokens with the gold answer's, and `context` what the model can take at all
    (`None`: no limit). Raises `InputError` for the first sample that does not fit, unless `on_bad` is `drop`: then
    `Fit.bad` lists them.
    """
    task = read_task(path)
    count = TokenCounter(processor, read_images(path), lambda name: image_path(path, task, name))
    lengths: dict[Part, Lengths] = {}
    bad: dict[Part, dict[str, str]] = {}
    tokens: dict[str, int] = {}
    for part in PARTS:
        found = Tally()
        bad[part] = {}
        limit: int | None
        key: str | None
        limit, key = (max_length, "train.max_length") if part == "train" else (max_model_len, "eval.max_model_len")
        if context is not None and (limit is None or limit > context):
            limit, key = context, None
        for sample, result in count.each(iter_samples(path, part)):
            if isinstance(result, InputError):
                problem, remedy = str(result), "Leave it out, or set prepare.on_bad: drop"
            elif limit is not None and result > limit:
                problem, remedy = _too_long(result, limit, key, len(sample["images"]))
            else:
                found.add(sample["id"], result)
                if part == "train":
                    tokens[sample["id"]] = result
                continue
            if on_bad == "error":
                raise InputError(problem, where=task["name"], field=f"{part} sample {sample['id']}", remedy=remedy)
            bad[part][sample["id"]] = problem
        if found.samples:
            lengths[part] = found.lengths()
    return Fit(lengths, bad, tokens)


def _too_long(tokens: int, limit: int, key: str | None, images: int) -> tuple[str, str]:
    """What is wrong with a sample, and what to do about it. `key` sets the limit; None: it is the model's context."""
    place = "" if key else " into the base model's context"
    ways = [f"Raise {key}" if key else "Shorten it", *(["lower base_model.processor.max_pixels"] if images else [])]
    problem = f"has {tokens} tokens, images included, but only {limit} fit{place}"
    return problem, f"{', '.join(ways)}, or set prepare.on_bad: drop"


def fit_task(
    path: Path,
    processor: Any,
    max_length: int | None,
    max_model_len: int | None = None,
    context: int | None = None,
    *,
    on_bad: Literal["error", "drop"],
    cache: Path,
) -> tuple[Path, Fit]:
    """`check_samples`; under `drop` the folder returned is one without the samples that do not fit."""
    fit = check_samples(path, processor, max_length, max_model_len, context, on_bad=on_bad)
    drop = {part: set(reasons) for part, reasons in fit.bad.items() if reasons}
    if drop:
        first = next(reason for reasons in fit.bad.values() for reason in reasons.values())
        path = drop_samples(path, drop, f"the model cannot take them; the first {first}", cache)
    return path, fit


class Tally:
    """Lengths of samples, added up one at a time."""

    def __init__(self) -> None:
        self.samples, self.total, self.max, self.longest = 0, 0, 0, ""

    def add(self, identity: str, tokens: int) -> None:
        """One more sample."""
        if tokens > self.max:
            self.max, self.longest = tokens, identity
        self.samples += 1
        self.total += tokens

    def lengths(self) -> Lengths:
        """Of the samples so far, one at least."""
        return Lengths(self.samples, self.max, self.total / self.samples, self.longest)


class TokenCounter:
    """Counts tokens by the processor's own rule for an image's size, or by running it where that rule is not exact.

    `images` are the facts of each image by its name in the samples, `locate` says where its file is.
    """

    def __init__(self, processor: Any, images: Mapping[str, ImageFacts], locate: Callable[[str], Path]):
        self.processor, self.images, self.locate = processor, images, locate
        tokens = (getattr(processor, name, None) for name in ("image_token", "video_token"))
        self.placeholders = [token for token in tokens if token]
        rule: Callable[..., Any] | None = getattr(processor, "_get_num_multimodal_tokens", None)
        self.rule = rule
        self.proved: set[int] = set()  # numbers of images a sample for which the rule was seen to be exact

    def each(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, int | InputError]]:
        """Tokens of each of any number of samples, or what is wrong with it."""
        remaining = iter(samples)
        while batch := list(islice(remaining, _BATCH)):
            yield from self(batch)

    def __call__(self, samples: Sequence[Sample]) -> list[tuple[Sample, int | InputError]]:
        """Tokens of each sample, or what is wrong with it."""
        results: list[tuple[Sample, int | InputError]] = []
        texts: list[tuple[Sample, str]] = []
        for sample in samples:
            try:
                texts.append((sample, self._text(sample)))
            except InputError as error:
                results.append((sample, error))
        if texts:
            options = tokenizer_options(self.processor, texts[0][1])
            encoded = self.processor.tokenizer([text for _, text in texts], **options)["input_ids"]
            for (sample, text), ids in zip(texts, encoded, strict=True):
                try:
                    results.append((sample, self._total(sample, text, len(ids))))
                except InputError as error:
                    results.append((sample, error))
        return results

    def _text(self, sample: Sample) -> str:
        messages = [*sample["prompt"], *sample["completion"]]
        for message in messages:
            for token in self.placeholders:
                if token in message["content"]:
                    raise InputError(f"the text of a {message['role']} turn holds the model's placeholder {token}")
        return render_chat(self.processor, messages, len(sample["images"]), add_generation_prompt=False)

    def _total(self, sample: Sample, text: str, text_tokens: int) -> int:
        """Tokens of text and images: each placeholder in the text stands for the tokens of one image."""
        names = sample["images"]
        if not names:
            return text_tokens
        if self.rule is None:
            return self._run(sample, text)
        sizes = [(self.images[name].height, self.images[name].width) for name in names]
        try:
            by_rule = text_tokens - len(names) + sum(self.rule(image_sizes=sizes)["num_image_tokens"])
        except ValueError as error:  # for example Qwen's limit on the ratio of an image's sides
            raise InputError(f"the processor refuses an image of {sizes} (height, width): {error}") from None
        if len(names) not in self.proved:
            if self._run(sample, text) != by_rule:
                self.rule = None  # a template or processor that adds tokens of its own around images
                return self._run(sample, text)
            self.proved.add(len(names))
        return by_rule

    def _run(self, sample: Sample, text: str) -> int:
        """Tokens as the whole processor makes them, pixels included."""
        images = [open_image(self.locate(name)) for name in sample["images"]]
        options = tokenizer_options(self.processor, text)
        return len(self.processor(text=[text], images=images, **options)["input_ids"][0])
