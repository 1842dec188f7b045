"""Answer-style diversification by rule (SEFE, arXiv 2505.02486): a share of a training set in other answer styles.

X % of the samples are converted in place, in equal parts over the styles that are not the task's own and that rules can
produce for it; everything else stays untouched. SEFE converts with a model; rules do what needs none.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ..answers import sentences
from ..schema import Sample, Style
from ..styles import THINK, split_prompt, split_reasoning
from .distractors import Pool
from .turns import Converted, Decks, Turn, Unreachable, convert_turn, reachable, take_apart

STYLES: tuple[Style, ...] = ("yes_no", "mcq", "short", "brief", "detailed")
_SAME_AS: dict[Style, Style] = {  # which of the five a native style already is
    "number": "short",
    "label": "short",
    "bbox": "short",
    "latex": "short",
    "caption": "brief",
}
_EXAMPLES = 3


def convert(
    samples: Sequence[Sample], fraction: float, seed: int, *, known_formats: Sequence[str] = ()
) -> tuple[list[Sample], dict[str, Any]]:
    """Convert a `fraction` (0 to 1) of `samples` in place: same order, ids and size.

    Which samples, into which style and with which distractors depends on the samples and the seed, not on their order.
    `known_formats` are sentences of the task's own that ask for its format; a sentence that nine of ten questions end
    with is found without them. A converted sample has `meta["asd"]` = {style, original_id, native_style, how}.

    Returns the samples and a report: counts and reasons by style, balance of letters and of yes and no, examples.
    """
    work = _Conversion(samples, fraction, seed, known_formats)
    work.run()
    return [work.converted.get(index, sample) for index, sample in enumerate(samples)], work.report()


class _Conversion:
    def __init__(self, samples: Sequence[Sample], fraction: float, seed: int, known_formats: Sequence[str]):
        self.samples, self.fraction, self.seed = samples, fraction, seed
        self.wanted = int(fraction * len(samples) + 0.5)
        self.converted: dict[int, Sample] = {}
        self.failed: set[tuple[int, Style]] = set()
        self.counts: Counter[Style] = Counter()
        self.quotas: dict[Style, int] = {}
        self.skipped: dict[Style, Counter[str]] = defaultdict(Counter)
        self.turns_converted = self.turns_native = 0
        self.known_formats = [*known_formats]
        if self.wanted:
            self.known_formats += _shared_endings(samples)
            self.dialogues = [take_apart(sample, self.known_formats) for sample in samples]
            self.pool = Pool(
                (turn.question, turn.content, turn.kind)
                for turns in self.dialogues
                for turn in turns
                if turn.content and turn.kind
            )
            self.decks = Decks(random.Random(f"{seed} positions"))

    def run(self) -> None:
        """Give each style its part, the scarcest first; what one cannot fill goes to the others."""
        if not self.wanted:
            return
        ranked = sorted(range(len(self.samples)), key=self._rank)
        able: dict[Style, list[int]] = {style: [] for style in STYLES}
        for index in ranked:
            sample, last = self.samples[index], self.dialogues[index][-1]
            for style in STYLES:
                if style == _SAME_AS.get(sample["style"], sample["style"]):
                    continue
                why_not = reachable(last, style)
                if why_not is None:
                    able[style].append(index)
                else:
                    self.skipped[style][why_not] += 1
        order = sorted((style for style in STYLES if able[style]), key=lambda style: len(able[style]))
        left = self.wanted
        for position, style in enumerate(order):
            self.quotas[style] = min(len(able[style]), -(-left // (len(order) - position)))
            left -= self.quotas[style]
        for style in order:
            self._fill(style, able[style], self.quotas[style])
        for style in sorted(order, key=lambda style: self.counts[style]):
            self._fill(style, able[style], self.counts[style] + self.wanted - len(self.converted))

    def _rank(self, index: int) -> bytes:
        return hashlib.sha256(f"{self.seed} {self.samples[index]['id']}".encode()).digest()

    def _fill(self, style: Style, candidates: list[int], count: int) -> None:
        """Convert candidates that are still native until `count` samples have the style."""
        for index in candidates:
            if self.counts[style] >= count:
                return
            if index not in self.converted and (index, style) not in self.failed:
                try:
                    self.converted[index] = self._convert(index, style)
                    self.counts[style] += 1
                except Unreachable as why_not:
                    self.failed.add((index, style))
                    self.skipped[style][str(why_not)] += 1

    def _convert(self, index: int, style: Style) -> Sample:
        """A sample with every turn that can be in the style; the last one, which references and style are of, must."""
        sample, turns = self.samples[index], self.dialogues[index]
        new: dict[int, Converted] = {}
        for position in reversed(range(len(turns))):
            rng = random.Random(f"{self.seed} {sample['id']} {position} {style}")
            try:
                new[position] = convert_turn(turns[position], style, sample["reasoning"], self.pool, rng, self.decks)
            except Unreachable:
                if position == len(turns) - 1:
                    raise
        self.turns_converted += len(new)
        self.turns_native += len(turns) - len(new)
        return _rewritten(sample, turns, new, style)

    def report(self) -> dict[str, Any]:
        """What was asked, what was reached and why not more, for `asd_report.json`."""
        total, reached = len(self.samples), len(self.converted)
        styles = {
            style: {
                "wanted": self.quotas.get(style, 0),
                "converted": self.counts[style],
                "skipped": dict(self.skipped[style].most_common()),
            }
            for style in STYLES
            if self.quotas.get(style) or self.skipped[style]
        }
        missing = [style for style in styles if not self.quotas.get(style)]
        shares = ", ".join(f"{style} {self.counts[style]}" for style in STYLES if self.counts[style])
        summary = f"{reached} of {total} samples converted ({100 * reached / max(1, total):.1f} %)"
        summary += f": {shares}" if shares else ""
        summary += f"; not reachable by rules: {', '.join(missing)}" if missing else ""
        if reached < self.wanted:
            summary += f"; {self.wanted - reached} fewer than asked"
        new = list(self.converted.values())
        return {
            "summary": summary,
            "fraction": self.fraction,
            "seed": self.seed,
            "samples": total,
            "wanted": self.wanted,
            "converted": reached,
            "native": dict(Counter(sample["style"] for sample in self.samples)),
            "styles": styles,
            "format_sentences": self.known_formats,
            "turns": {"converted": self.turns_converted, "left native": self.turns_native},
            "letters": dict(sorted(Counter(_answer(s) for s in new if s["style"] == "mcq").items())),
            "yes_no": dict(sorted(Counter(_answer(s) for s in new if s["style"] == "yes_no").items())),
            "how": dict(sorted(Counter(f"{s['style']}: {s['meta']['asd']['how']}" for s in new).items())),
            "examples": self._examples(),
        }

    def _examples(self) -> dict[str, list[dict[str, Any]]]:
        examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for index in sorted(self.converted, key=self._rank):
            before, after = self.samples[index], self.converted[index]
            if len(examples[after["style"]]) < _EXAMPLES:
                examples[after["style"]].append(
                    {
                        "id": after["id"],
                        **{
                            name: {"prompt": sample["prompt"], "completion": sample["completion"]}
                            for name, sample in (("before", before), ("after", after))
                        },
                    }
                )
        return dict(examples)


def _rewritten(sample: Sample, turns: list[Turn], new: dict[int, Converted], style: Style) -> Sample:
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


def _answer(sample: Sample) -> str:
    return sample["references"][0]


def _shared_endings(samples: Sequence[Sample]) -> list[str]:
    """A sentence, not known to us, that asks for an answer's format at the end of nine of ten first questions."""
    endings: Counter[str] = Counter()
    for sample in samples:
        text = sample["prompt"][-1]["content"].rstrip().removesuffix(THINK)
        parts = sentences(text)
        if len(parts) > 1 and re.match(r"(?:please\s+)?(?:answer|respond|reply)\b", parts[-1], re.IGNORECASE):
            endings[parts[-1]] += 1
    common = [ending for ending, count in endings.items() if count >= 0.9 * len(samples)]
    return [ending for ending in common if split_prompt(ending)[0]]
