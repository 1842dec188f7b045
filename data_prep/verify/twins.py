"""The same sample twice in a part, and what is tested or validated on in any training set."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import InputError
from ..forms import final_answer
from ..readers import PARTS, Part
from .pictures import HASH_BITS, Pictures, near
from .problems import Ref
from .scan import Entry, Scan

_FREE_TEXT = ("brief", "detailed", "caption")  # many answers to one question may be right


class Overlap(NamedTuple):
    """How many samples of a held-out part the training set of the task `trained` gives away.

    Of the `leaked`, `image` show the very pixels and `near` another version of an image; the others have none.
    `question` of them ask the same too.
    """

    task: str
    part: Part
    samples: int
    trained: str
    leaked: int
    image: int
    near: int
    question: int


class _Match(NamedTuple):
    """A training sample that gives a held-out one away, and by what; the distance of the hashes where it is near."""

    by: Literal["file", "pixels", "near", "question"]
    distance: int
    asks_the_same: bool
    offset: int


def find_twins(scan: Scan, pictures: Pictures) -> None:
    """Duplicates and contradictions inside each part of a task."""
    same = _representatives(pictures)
    for part in PARTS:
        seen: dict[bytes, Entry] = {}
        for entry in scan.entries:
            if entry.part != part:
                continue
            shown = repr([same[number] for number in entry.images]).encode()
            first = seen.setdefault(hashlib.blake2b(shown + entry.question, digest_size=16).digest(), entry)
            if first is entry:
                continue
            record, earlier = scan.record(entry.offset), scan.record(first.offset)
            images = "images, " if entry.images else ""
            if first.answer == entry.answer:
                problem = f"the same {images}question and answer as {earlier.where}"
                scan.complain("duplicate", problem, record, remedy="Leave one of them out")
            elif entry.style not in _FREE_TEXT:
                one, other = (final_answer(found.sample["completion"])[:60] for found in (record, earlier))
                culprits = [Ref(scan.number, offset) for offset in (entry.offset, first.offset)]
                scan.complain(
                    "conflict",
                    f"the same {images}question as {earlier.where}, but the answer {one!r} instead of {other!r}",
                    record,
                    field="answer",
                    remedy="Correct one of them, or leave both out",
                    culprits=culprits,
                )


def find_leaks(scans: Sequence[Scan], pictures: Pictures) -> list[Overlap]:
    """What any training set shows or asks of any held-out part: findings, and counts for each pair that has some.

    A question counts together with its image: that two images are asked the same is how tasks are made.
    """
    same = _representatives(pictures)
    held = sorted({same[n] for scan in scans for entry in scan.entries if entry.part != "train" for n in entry.images})
    trained = sorted(
        {same[n] for scan in scans for entry in scan.entries if entry.part == "train" for n in entry.images}
    )
    versions = near(held, trained, pictures)
    overlaps = []
    for training in scans:
        index = _Index(
            training, {*held, *(other for others in versions.values() for other, _ in others)}, pictures, same
        )
        for scan in scans:
            parts: tuple[Part, ...] = ("validation", "test")
            for part in parts:
                entries = [entry for entry in scan.entries if entry.part == part]
                best = []
                for entry in entries:
                    if matches := index.matches(entry, versions):
                        best.append(matches[0])
                        _complain(scan, entry, training, matches)
                if best:
                    overlaps.append(
                        Overlap(
                            task=scan.name,
                            part=part,
                            samples=len(entries),
                            trained=training.name,
                            leaked=len(best),
                            image=sum(match.by in ("file", "pixels") for match in best),
                            near=sum(match.by == "near" for match in best),
                            question=sum(match.asks_the_same for match in best),
                        )
                    )
    return overlaps


class _Index:
    """The training samples of a task by the images that they show (those `wanted`), or else by their question."""

    def __init__(self, training: Scan, wanted: set[int], pictures: Pictures, same: list[int]):
        self.pictures, self.same = pictures, same
        self.shows: dict[int, list[tuple[Entry, int]]] = defaultdict(list)  # with the image's own number
        self.asks: dict[bytes, list[Entry]] = defaultdict(list)
        for entry in training.entries:
            if entry.part == "train":
                for number in entry.images:
                    if same[number] in wanted:
                        self.shows[same[number]].append((entry, number))
                if not entry.images:
                    self.asks[entry.question].append(entry)

    def matches(self, entry: Entry, versions: dict[int, list[tuple[int, int]]]) -> list[_Match]:
        """What gives a held-out sample away, the worst first."""
        if not entry.images:
            return [_Match("question", 0, True, found.offset) for found in self.asks.get(entry.question, ())]
        matches = []
        for number in entry.images:
            for found, other in self.shows.get(self.same[number], ()):
                first, second = (self.pictures.sound(n).facts.sha256 for n in (number, other))
                by: Literal["file", "pixels"] = "file" if first == second else "pixels"
                matches.append(_Match(by, 0, found.question == entry.question, found.offset))
            for version, distance in versions.get(self.same[number], ()):
                for found, _ in self.shows.get(version, ()):
                    matches.append(_Match("near", distance, found.question == entry.question, found.offset))
        return sorted(matches, key=lambda match: (not match.asks_the_same, match.by == "near", match.distance, match))


def _complain(scan: Scan, entry: Entry, training: Scan, matches: list[_Match]) -> None:
    worst, offsets = matches[0], list(dict.fromkeys(match.offset for match in matches))
    shown = {
        "file": "the same image file",
        "pixels": "the same pixels in another file",
        "near": f"another version of the image ({worst.distance} of {HASH_BITS} bits of the hash differ)",
        "question": "the same question, without an image",
    }[worst.by]
    also = " and the same question" if worst.asks_the_same and entry.images else ""
    more = f" and {len(offsets) - 1} more" if len(offsets) > 1 else ""
    scan.complain(
        "leak",
        f"{shown}{also} in the training data of {training.name}: {training.record(worst.offset).where}{more}",
        scan.record(entry.offset),
        field="image" if entry.images else "question",
        remedy=f"Leave those out of the training data of {training.name}",
        culprits=[Ref(training.number, offset) for offset in offsets],
    )


def _representatives(pictures: Pictures) -> list[int]:
    """For each image, the first with the same pixels; one that does not decode stands for itself."""
    first: dict[bytes, int] = {}
    return [
        number if isinstance(found, InputError) else first.setdefault(found.pixels, number)
        for number, found in enumerate(pictures.found)
    ]
