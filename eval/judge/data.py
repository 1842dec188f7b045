"""What a judge is tuned on by the pipeline's own SFT: rated reasoning, put exactly as a judge is asked about it.

`brief` and `full` are layouts of files with ratings, `closeness` is the scorer; recipes/judge/ uses them, and
docs/judging.md says what a file holds.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_jsonl
from mcit.data_prep.forms import final_answer
from mcit.data_prep.readers import read_rows
from mcit.data_prep.rows import parse_row
from mcit.data_prep.schema import Sample
from mcit.data_prep.styles import split_reasoning

from .corruptions import KINDS, Corrupted, Kind, corrupt
from .prompts import Instructions, Unreadable, dimensions_of, judge_prompt, read_verdict, write_verdict
from .rubrics import DIMENSIONS, Dimension, check_rubric

_OTHERS = 50  # rationales of other samples that wrong facts are taken from


def brief(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """A rated reasoning as a sample of judging, without the rubric's words (`eval.judge.instructions: brief`)."""
    return _row(raw, "brief")


def full(raw: dict[str, Any], part: str) -> dict[str, Any]:
    """The same with the whole rubric in every prompt."""
    return _row(raw, "full")


def closeness(response: str, references: list[str], sample: Sample) -> float:
    """100 − the mean distance of the judge's scores from the ratings; 0 for a reply that is no verdict."""
    dimensions: tuple[Dimension, ...] = tuple(name for name in DIMENSIONS if f'"{name}"' in references[0])
    gold = read_verdict(references[0], dimensions).scores
    try:
        said = read_verdict(response, dimensions).scores
    except Unreadable:
        return 0.0
    return 100 - sum(abs(said[name] - gold[name]) for name in dimensions) / len(dimensions)


def write_corrupted(source: Path, target: Path, seed: int) -> dict[str, int]:
    """Corrupt the rationales of a data file, one way a sample in turn, and write them with their ratings as JSONL.

    `source` is of any layout that rows may have; samples without `<think>` are left out. Returns how many there are of
    each kind. Image paths stay relative to the folder of `source`. Raises `InputError`.
    """
    samples, thinks = [], []
    for where, raw in read_rows(source.name, "train", source.parent.resolve()):
        row = parse_row(raw, where)
        think = split_reasoning(row.completion[-1]["content"], "think")[0]
        if not think:
            continue
        if not all(isinstance(image, str) for image in row.images):
            raise InputError("holds images, not their paths", where=where, remedy="Prepare the data first")
        answer = final_answer(row.completion)
        known = {"id": row.id or str(len(samples)), "images": row.images, "prompt": row.prompt}
        samples.append({**known, "references": row.references or [answer], "meta": row.meta})
        thinks.append(think)
    if not samples:
        raise InputError("no answer holds <think>…</think>", where=source)
    made = [
        rated(sample, found, sample["references"][0], found.ratings)
        for sample, found in corrupted(samples, thinks, seed)
    ]
    write_jsonl(target, made)
    return {kind: sum(row["kind"] == kind for row in made) for kind in KINDS}


def corrupted(samples: list[dict[str, Any]], thinks: list[str], seed: int) -> Iterator[tuple[dict, Corrupted]]:
    """Each sample with its rationale (of `thinks`) corrupted in one way, in turn; where it cannot be, in the next."""
    for place, (sample, think) in enumerate(zip(samples, thinks, strict=True)):
        rng = random.Random(f"{seed} {sample['id']}")
        others = [thinks[(place + i) % len(thinks)] for i in range(1, min(_OTHERS, len(thinks)))]
        turns: list[Kind] = [KINDS[(place + i) % len(KINDS)] for i in range(len(KINDS))]
        made = (corrupt(kind, think, others, bool(sample["images"]), rng) for kind in turns)
        yield sample, next(found for found in made if found)


def rated(
    sample: Mapping[str, Any], made: Corrupted, answer: str, ratings: Mapping[Dimension, float]
) -> dict[str, Any]:
    """A line of a ratings file."""
    return {
        "id": f"{sample['id']}-{made.kind}",
        "kind": made.kind,
        "images": sample["images"],
        "prompt": sample["prompt"],
        "references": sample["references"],
        "response": f"<think>{made.think}</think><answer>{answer}</answer>",
        "ratings": dict(ratings),
        "comment": made.comment,
        "source": str((sample.get("meta") or {}).get("image_id") or sample["id"]),
    }


def _row(raw: Mapping[str, Any], instructions: Instructions) -> dict[str, Any]:
    prompt = [{"role": "user", "content": raw["prompt"]}] if isinstance(raw["prompt"], str) else raw["prompt"]
    images = raw.get("images") or ([raw["image"]] if raw.get("image") else [])
    rubric = raw.get("rubric", "general")
    check_rubric(rubric)
    asked = cast(Sample, {"images": images, "prompt": prompt, "references": raw["references"]})
    scores: dict[Dimension, float] = {
        name: raw["ratings"][name] for name in dimensions_of(asked) if name in raw["ratings"]
    }
    if not scores or not all(0 <= score <= 100 for score in scores.values()):
        raise InputError(f"{raw['ratings']!r} are no ratings in 0–100", field="ratings")
    words = judge_prompt(asked, raw["response"], rubric, instructions, tuple(scores))
    verdict = write_verdict(scores, raw.get("comment", ""))
    return {
        "id": raw.get("id"),
        "images": images,
        "prompt": [{"role": "system", "content": words.system}, {"role": "user", "content": words.user}],
        "completion": [{"role": "assistant", "content": verdict}],
        "references": [verdict],
        "meta": {"image_id": raw.get("source"), "kind": raw.get("kind")},
    }
