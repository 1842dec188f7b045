"""What was asked of ASD, what was reached and why not more: `asd_report.json`, and what `mcit asd` prints."""

from collections import Counter, defaultdict
from typing import Any

from ..schema import AsdConfig, Sample, Style
from ..styles import fits, split_reasoning
from .conversion import STYLES, Conversion

_EXAMPLES = 10  # of each style
_CLOSE_ENOUGH = 0.005  # half a percentage point of the share asked for


def make_report(done: Conversion, asd: AsdConfig, seed: int) -> dict[str, Any]:
    """Counts and reasons by style, balance of letters and of yes and no, examples before and after."""
    new = [done.converted[index] for index in sorted(done.converted)]
    counts = Counter(sample["style"] for sample in new)
    total, reached = len(done.before), len(new)
    styles = {
        style: {
            "converted": counts[style],
            "able": done.able.get(style, 0),
            "rounds": done.rounds.get(style, 0),
            "fell_back": dict(done.fell_back[style].most_common()) if style in done.fell_back else {},
            "skipped": dict(done.skipped[style].most_common()) if style in done.skipped else {},
        }
        for style in STYLES
        if style in done.able or style in done.skipped
    }
    reached_share = reached / max(1, total)
    return {
        "summary": _summary(done, counts, asd),
        **asd.identity(),
        **done.provenance,
        "seed": seed,
        "reached": round(reached_share, 6),
        "within_half_a_point": abs(reached_share - asd.fraction) <= _CLOSE_ENOUGH,
        "why_not": _why_not(done, reached) if abs(reached_share - asd.fraction) > _CLOSE_ENOUGH else [],
        "samples": total,
        "wanted": done.wanted,
        "converted": reached,
        "native": dict(Counter(sample["style"] for sample in done.before)),
        "styles": styles,
        "format_sentences": done.format_sentences,
        "turns": done.turns,
        "letters": _answers("mcq", new),
        "yes_no": _answers("yes_no", new),
        "how": dict(sorted(Counter(f"{s['style']}: {s['meta']['asd']['how']}" for s in new).items())),
        "usage": done.usage,
        "examples": _examples(done),
    }


def _summary(done: Conversion, counts: Counter[Style], asd: AsdConfig) -> str:
    total, reached = len(done.before), counts.total()
    parts = f"{reached} of {total} samples converted ({100 * reached / max(1, total):.1f} %)"
    shares = ", ".join(f"{style} {counts[style]}" for style in STYLES if counts[style])
    parts += f": {shares}" if shares else ""
    missing = [style for style in STYLES if style in done.skipped and style not in done.able]
    if done.wanted and missing:
        parts += f"; not reachable by {asd.converter}: {', '.join(missing)}"
    fell_back = sum((reasons for reasons in done.fell_back.values()), Counter[str]())
    if fell_back:
        parts += f"; {fell_back.total()} fell back, most often: {fell_back.most_common(1)[0][0]}"
    if reached < done.wanted:
        parts += f"; {done.wanted - reached} fewer than asked"
    return parts


def _why_not(done: Conversion, reached: int) -> list[str]:
    """Why the share is another than the one asked for, the most frequent reason first."""
    if reached == done.wanted:
        return [f"one sample more or less is {100 / max(1, len(done.before)):.1f} points of the share"]
    reasons = Counter[str]()
    for found in (done.fell_back, done.skipped):
        for style, counts in found.items():
            reasons.update({f"{style}: {reason}": count for reason, count in counts.items()})
    return [f"{reason} ({count})" for reason, count in reasons.most_common()]


def _examples(done: Conversion) -> dict[str, list[dict[str, Any]]]:
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for index in done.order:
        after = done.converted.get(index)
        if after and len(examples[after["style"]]) < _EXAMPLES:
            texts = {
                name: {"prompt": sample["prompt"], "completion": sample["completion"]}
                for name, sample in (("before", done.before[index]), ("after", after))
            }
            examples[after["style"]].append(
                {"id": after["id"], "images": after["images"], "how": after["meta"]["asd"]["how"], **texts}
            )
    return dict(examples)


def _answers(style: Style, new: list[Sample]) -> dict[str, int]:
    """How often each answer is given in a style, earlier turns of dialogues included (but those that stayed native)."""
    turns = (
        split_reasoning(message["content"], sample["reasoning"])[1]
        for sample in new
        if sample["style"] == style
        for message in sample["completion"]
        if message["role"] == "assistant"
    )
    return dict(sorted(Counter(answer for answer in turns if fits(style, answer)).items()))
