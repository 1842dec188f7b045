"""Writing a prepared task: its parts, one sample in memory at a time, and what is known of the whole."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .files import hash_json, hash_rows, write_json, writing_jsonl
from .images import ImageFacts
from .readers import PARTS, Part
from .schema import Sample


class Written(NamedTuple):
    """A part that lies on disk: its number of samples, the images that they show with their SHA-256, and its hash."""

    samples: int
    images: dict[str, str]
    hash: str


def write_part(folder: Path, part: Part, samples: Iterable[Sample], images: Mapping[str, ImageFacts]) -> Written:
    """Write `<part>.jsonl`. `images` knows every image of the samples, by the name that they give it."""
    count, shown = 0, dict[str, str]()

    def hashed() -> Iterator[Any]:
        nonlocal count
        for sample in writing_jsonl(folder / f"{part}.jsonl", samples):
            count += 1
            shown.update((name, images[name].sha256) for name in sample["images"])
            yield sample
        yield shown

    digest = hash_rows(hashed())
    return Written(count, shown, digest)


def write_task(
    folder: Path, parts: Mapping[Part, Written], images: Mapping[str, ImageFacts], task: Mapping[str, Any]
) -> None:
    """Write `images.json` and, last, `task.json` from `task` with the parts' counts and hashes added."""
    write_json(folder / "images.json", dict(images))
    counts = {part: parts[part].samples if part in parts else 0 for part in PARTS}
    identity = {
        "hash": hash_json({part: written.hash for part, written in parts.items()}),
        "train_hash": parts["train"].hash,
        "test_hash": parts["test"].hash,
    }
    write_json(folder / "task.json", {**task, "counts": counts, **identity})
