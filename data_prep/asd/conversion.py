"""Answer-style diversification (SEFE, arXiv 2505.02486): a share of a training set in other answer styles.

X % of the samples are converted in place, in equal parts over the styles that are not the task's own and that the
converter can produce for it; everything else stays untouched. Which samples, into which style, where the right option
stands and whether a proposition is true is decided here; a converter (`rules.py`, `llm.py`) supplies wrong answers and
explanations.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from ..answers import sentences
from ..schema import Sample, Style
from ..styles import THINK, split_prompt, split_reasoning
from .turns import Converted, Decks, Job, Material, Turn, Unreachable, assemble, take_apart

STYLES: tuple[Style, ...] = ("yes_no", "mcq", "short", "brief", "detailed")
_TOO_FEW_TO_TELL = 4  # failures
_SAME_AS: dict[Style, Style] = {  # which of the five a native style already is
    "number": "short",
    "label": "short",
    "bbox": "short",
    "latex": "short",
    "caption": "brief",
}
_Verdict = tuple[tuple[Style, str | None], ...]  # for each style but a sample's own, why it cannot become that


class Converter(Protocol):
    """What supplies wrong answers and explanations.

    `patience` is how many failures a style may cost for each sample wanted in it before the others take over its part
    (`None`: any number). A style in which everything fails is given up at once: a model that cannot do it is not paid
    to fail on the whole task. `at_once` is for how many samples material is asked at a time (`None`: all).
    """

    @property
    def patience(self) -> int | None:
        """See above."""

    @property
    def at_once(self) -> int | None:
        """See above."""

    def learn(self, turns: Sequence[Turn]) -> None:
        """Take note of a dialogue of the task; it gets to see all of them before it supplies anything."""

    def why_not(self, turn: Turn, style: Style) -> str | None:
        """Why a turn cannot be put into a style, as far as that is known without trying."""

    def supply(self, jobs: Sequence[Job]) -> list[Material | Unreachable]:
        """The material of each job, or why there is none. It depends on the job alone, not on its company."""

    def provenance(self) -> dict[str, Any]:
        """What the report and every converted sample say of the converter."""

    def usage(self) -> dict[str, Any]:
        """What it cost, for the report."""


class Samples(Protocol):
    """A training set: a list, or a `SampleFile`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Conversion(NamedTuple):
    """A finished conversion, as `report.py` tells of it."""

    before: Samples
    converted: dict[int, Sample]  # by their places in `before`
    order: list[int]  # of all samples, as they were considered
    wanted: int
    able: dict[Style, int]  # how many samples nothing is known against
    skipped: dict[Style, Counter[str]]  # why others were not tried
    fell_back: dict[Style, Counter[str]]  # why tried ones stayed native
    rounds: dict[Style, int]
    turns: dict[str, int]
    format_sentences: list[str]
    provenance: dict[str, Any]
    usage: dict[str, Any]

    def after(self) -> Iterator[Sample]:
        """The training set with the converted samples in it."""
        return (self.converted.get(index, sample) for index, sample in enumerate(self.before))


def convert(
    samples: Samples,
    fraction: float,
    seed: int,
    converter: Converter,
    *,
    known_formats: Sequence[str] = (),
) -> Conversion:
    """Convert a `fraction` (0 to 1) of `samples` in place: same order, ids and size.

    Which samples, into which style and with which distractors depends on the samples, the seed and the converter's
    answers, not on the samples' order. `known_formats` are sentences of the task's own that ask for its format; a
    sentence that nine of ten questions end with is found without them. Of samples that are not converted nothing stays
    in memory but where they are and what they can become.

    A converted sample has `meta["asd"]` = {style, original_id, native_style, how} and the converter's provenance.
    """
    formats = [*known_formats, *_shared_endings(samples)]
    work = _Work(samples, int(fraction * len(samples) + 0.5), seed, formats, converter)
    work.run()
    return Conversion(
        before=samples,
        converted=work.converted,
        order=work.order,
        wanted=work.wanted,
        able={style: len(indices) for style, indices in work.able.items()},
        skipped=work.skipped,
        fell_back=work.fell_back,
        rounds=dict(work.rounds),
        turns={"converted": work.turns_converted, "left native": work.turns_native},
        format_sentences=formats,
        provenance=converter.provenance(),
        usage=converter.usage(),
    )


class _Work:
    def __init__(self, samples: Samples, wanted: int, seed: int, formats: Sequence[str], converter: Converter):
        self.samples, self.wanted, self.seed = samples, wanted, seed
        self.formats, self.converter = formats, converter
        self.decks = Decks(random.Random(f"{seed} positions"))
        self.order: list[int] = []
        self.converted: dict[int, Sample] = {}
        self.counts: Counter[Style] = Counter()
        self.failed: dict[Style, set[int]] = defaultdict(set)
        self.rounds: Counter[Style] = Counter()
        self.part: Counter[Style] = Counter()  # the samples that are to have each style, as of now
        self.closed: set[Style] = set()
        self.skipped: dict[Style, Counter[str]] = defaultdict(Counter)
        self.fell_back: dict[Style, Counter[str]] = defaultdict(Counter)
        self.turns_converted = self.turns_native = 0
        self.able = self._sort(self._read())

    def _read(self) -> list[_Verdict]:
        """What each sample can become. On the way the converter learns, and the order is found."""
        verdicts, ranks = list[_Verdict](), list[bytes]()
        known: dict[_Verdict, _Verdict] = {}  # there are few different ones
        for sample in self.samples:
            turns = take_apart(sample, self.formats)
            self.converter.learn(turns)
            own = _SAME_AS.get(sample["style"], sample["style"])
            verdict = tuple((style, self.converter.why_not(turns[-1], style)) for style in STYLES if style != own)
            verdicts.append(known.setdefault(verdict, verdict))
            ranks.append(hashlib.sha256(f"{self.seed} {sample['id']}".encode()).digest())
        self.order = sorted(range(len(ranks)), key=ranks.__getitem__)
        return verdicts

    def _sort(self, verdicts: list[_Verdict]) -> dict[Style, list[int]]:
        """The samples that may be put into each style, the scarcest style first."""
        able: dict[Style, list[int]] = {style: [] for style in STYLES}
        for index in self.order:
            for style, why_not in verdicts[index]:
                if why_not is None:
                    able[style].append(index)
                else:
                    self.skipped[style][why_not] += 1
        scarcest = sorted(able, key=lambda style: len(able[style]))
        return {style: able[style] for style in scarcest if able[style]}

    def run(self) -> None:
        """Round after round, give each style its part; what one cannot fill goes to the others."""
        while len(self.converted) < self.wanted and (batch := self._pick()):
            self._convert(batch)

    def _pick(self) -> list[tuple[int, Style]]:
        """The samples to try next, each in one style: as many as are missing, spread as evenly as can be.

        A sample that failed in another style comes last: what makes it difficult may be the sample.
        """
        failures = Counter(index for indices in self.failed.values() for index in indices)
        left = {
            style: sorted(
                (index for index in able if index not in self.converted and index not in self.failed[style]),
                key=lambda index: failures[index],
            )
            for style, able in self.able.items()
            if style not in self.closed
        }
        self.part, room = Counter(self.counts), {style: len(indices) for style, indices in left.items()}
        for _ in range(self.wanted - len(self.converted)):
            styles = [style for style in room if room[style]]
            if not styles:
                break
            lowest = min(styles, key=lambda style: self.part[style])
            self.part[lowest] += 1
            room[lowest] -= 1
        batch: dict[int, Style] = {}
        for style, indices in left.items():
            free = (index for index in indices if index not in batch)
            for index, _ in zip(free, range(self.part[style] - self.counts[style]), strict=False):
                batch[index] = style
        return list(batch.items())

    def _convert(self, batch: list[tuple[int, Style]]) -> None:
        """Put each sample of the batch into its style, or note why it stays native."""
        step = self.converter.at_once or len(batch)
        for start in range(0, len(batch), step):
            jobs = {entry: self._jobs(*entry) for entry in batch[start : start + step]}
            supplies = iter(self.converter.supply([job for of_sample in jobs.values() for job in of_sample]))
            for (index, style), of_sample in jobs.items():
                supplied = [(job, next(supplies)) for job in of_sample]
                try:
                    self.converted[index] = self._rewrite(index, style, supplied)
                    self.counts[style] += 1
                except Unreachable as why:
                    self.failed[style].add(index)
                    self.fell_back[style][str(why)] += 1
        for style in {style for _, style in batch}:
            self.rounds[style] += 1
            patience, failures = self.converter.patience, len(self.failed[style])
            if patience is None or failures < _TOO_FEW_TO_TELL:
                continue
            if not self.counts[style] or failures >= patience * self.part[style]:
                self.closed.add(style)

    def _jobs(self, index: int, style: Style) -> list[Job]:
        """The turns of a sample that may be put into the style, the last one first."""
        sample = self.samples[index]
        turns = take_apart(sample, self.formats)
        return [
            Job(turns, position, style, sample["images"], f"{self.seed} {sample['id']} {position} {style}")
            for position in reversed(range(len(turns)))
            if self.converter.why_not(turns[position], style) is None
        ]

    def _rewrite(self, index: int, style: Style, supplied: list[tuple[Job, Material | Unreachable]]) -> Sample:
        """A sample with every turn that can be in the style; the last one, which references and style are of, must."""
        sample, new = self.samples[index], dict[int, Converted]()
        turns = supplied[0][0].turns
        for job, material in supplied:
            try:
                if isinstance(material, Unreachable):
                    raise material
                new[job.position] = assemble(job.turn, style, material, sample["reasoning"], self.decks)
            except Unreachable:
                if job.position == len(turns) - 1:
                    raise
        self.turns_converted += len(new)
        self.turns_native += len(turns) - len(new)
        return _rewritten(sample, turns, new, style, self.converter.provenance())


def _rewritten(
    sample: Sample, turns: Sequence[Turn], new: dict[int, Converted], style: Style, provenance: dict[str, Any]
) -> Sample:
    """The sample with its converted turns in place; id and images stay, references and style are the last turn's."""
    native = next((turn.format for turn in turns if turn.format), "")
    messages = [message.copy() for message in [*sample["prompt"], *sample["completion"]]]
    start = len(messages) - 2 * len(turns)  # a system turn stays as it is
    for index, turn in enumerate(turns):
        user, assistant = messages[start + 2 * index], messages[start + 2 * index + 1]
        if index in new:
            user["content"], assistant["content"] = new[index].user, new[index].answer
        elif native and not turn.format:  # it had leant on an earlier turn's sentence, which may now ask otherwise
            user["content"] = f"{turn.user}\n{native}"
    last = new[len(turns) - 1]
    meta = {key: value for key, value in sample.get("meta", {}).items() if key != "options"}
    meta["question"] = turns[-1].question
    if last.options:
        meta["options"] = last.options
    meta["asd"] = {
        "style": style,
        "original_id": sample["id"],
        "native_style": sample["style"],
        "how": last.how,
        **provenance,
    }
    split = len(sample["prompt"])
    return {
        **sample,
        "prompt": messages[:split],
        "completion": messages[split:],
        "references": [split_reasoning(last.answer, sample["reasoning"])[1]],
        "style": style,
        "meta": meta,
    }


def _shared_endings(samples: Samples) -> list[str]:
    """A sentence, not known to us, that asks for an answer's format at the end of nine of ten first questions."""
    endings: Counter[str] = Counter()
    for sample in samples:
        text = sample["prompt"][-1]["content"].rstrip().removesuffix(THINK)
        parts = sentences(text)
        if len(parts) > 1 and re.match(r"(?:please\s+)?(?:answer|respond|reply)\b", parts[-1], re.IGNORECASE):
            endings[parts[-1]] += 1
    common = [ending for ending, count in endings.items() if count >= 0.9 * len(samples)]
    return [ending for ending in common if split_prompt(ending)[0]]
