"""The ways in which a cell's questions are asked, and the answers there are so far to each, on disk and in a cache."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from PIL import Image

from mcit.data_prep.files import atomic_open, write_jsonl
from mcit.data_prep.identity import rank
from mcit.data_prep.prepare import image_path
from mcit.data_prep.schema import PreparedTask, Sample

from .constraints import constraint_of
from .engines.base import Policy, Request

# free: as the sample asks. constrained: the same question, the answer held to its form. gold: no question, but how
# likely the sample's own answer is. swapped, blank: with the images of another sample, and with grey ones.
Kind = Literal["free", "constrained", "gold", "swapped", "blank"]
GOLD_SAMPLES = 64  # of a general task, whose answers' log-likelihood is followed
_GREY = (128, 128, 128)


@dataclass(eq=False)
class Asking:
    """One way of asking. A request a sample that is asked so, by its id, and the answers so far."""

    kind: Kind
    key: str  # what the answers depend on
    partial: Path  # where they lie until all are there
    requests: dict[str, Request] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    engine: str | None = None  # that gave them

    @property
    def is_complete(self) -> bool:
        """Whether every request has an answer."""
        return len(self.answers) == len(self.requests)

    def resume(self, cache: Path) -> None:
        """Read the answers that this run, or another with the same policy, data and options, has got."""
        kept = self._read(self._cached(cache))
        if not kept or len(kept[1]) < len(self.requests):
            kept = self._read(self.partial) or kept
        self.engine, self.answers = kept or (None, {})

    def begin(self, engine: str) -> list[str]:
        """The ids of what `engine` is still to be asked; answers of two engines are not mixed."""
        if self.engine != engine:
            self.engine, self.answers = engine, {}
        return [name for name in self.requests if name not in self.answers]

    def settled(self, name: str, free: Mapping[str, Any]) -> bool:
        """Whether a question held to its form would be answered as it was freely.

        It would where the free answer has the form: each of its tokens was the likeliest of all, so it is the likeliest
        of those that are allowed.
        """
        return free["finished"] and re.fullmatch(self.requests[name].pattern, free["text"]) is not None

    def open(self) -> TextIO:
        """The partial file, holding what is known already, open for more; each line is written at once."""
        write_jsonl(self.partial, [self._header(), *self.answers.values()])
        return open(self.partial, "a", encoding="utf-8", buffering=1)

    def keep(self, cache: Path) -> None:
        """Put complete answers where other runs find them."""
        if self.requests and not self._cached(cache).exists():
            write_jsonl(self._cached(cache), [self._header(), *(self.answers[name] for name in self.requests)])

    def _header(self) -> dict[str, Any]:
        return {"fingerprint": self.key, "engine": self.engine}

    def _cached(self, cache: Path) -> Path:
        return cache / "predictions" / f"{self.key}.jsonl"

    def _read(self, path: Path) -> tuple[str, dict[str, dict[str, Any]]] | None:
        """The engine and the whole lines of an answers file that belongs to this; None if there is none."""
        if not path.exists():
            return None
        rows = list(_whole_lines(path))
        if not rows or rows[0].get("fingerprint") != self.key:
            return None
        return rows[0]["engine"], {row["id"]: row for row in rows[1:] if row["id"] in self.requests}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows up to the first that was cut off (by a kill, or a full disk)."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class Questions:
    """What a task's samples become when they are put to a policy."""

    def __init__(self, samples: Sequence[Sample], folder: Path, task: PreparedTask, policy: Policy, blanks: Path):
        """`blanks` is a folder for grey pictures, which are made where they are missing."""
        self.samples, self.folder, self.task, self.policy, self.blanks = samples, folder, task, policy, blanks

    def requests(self, kind: Kind, pictured: int = 0) -> dict[str, Request]:
        """The requests of one way of asking, by the samples' ids. `pictured` samples are asked without their images."""
        if kind == "constrained":
            held = {sample["id"]: constraint_of(sample, self.task.get("choices")) for sample in self.samples}
            asked = ((sample, held[sample["id"]]) for sample in self.samples)
            return {s["id"]: self._request(s)._replace(pattern=form.pattern) for s, form in asked if form}
        if kind == "gold":
            return {sample["id"]: self._request(sample) for sample in chosen(self.samples, GOLD_SAMPLES)}
        if kind == "swapped":
            pairs = _exchanged(chosen([sample for sample in self.samples if sample["images"]], pictured))
            return {one["id"]: self._request(one)._replace(images=self._images(other)) for one, other in pairs}
        if kind == "blank":
            shown = chosen([sample for sample in self.samples if sample["images"]], pictured)
            return {s["id"]: self._request(s)._replace(images=[*map(self._blank, self._images(s))]) for s in shown}
        return {sample["id"]: self._request(sample) for sample in self.samples}

    def _request(self, sample: Sample) -> Request:
        return Request(sample["prompt"], self._images(sample), self.policy, sample["completion"][0]["content"])

    def _images(self, sample: Sample) -> list[Path]:
        return [image_path(self.folder, self.task, name) for name in sample["images"]]

    def _blank(self, path: Path) -> Path:
        """A grey picture of the same size."""
        with Image.open(path) as image:
            width, height = image.size
        blank = self.blanks / f"{width}x{height}.png"
        if not blank.exists():
            with atomic_open(blank, "wb") as file:
                Image.new("RGB", (width, height), _GREY).save(file, "png")
        return blank


def chosen(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples (or all there are), the same at every stage, in every run and whatever the order of the data."""
    return sorted(samples, key=lambda sample: rank(f"asked {sample['id']}"))[:count]


def _exchanged(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Sample]]:
    """Each sample with the next one (the first follows the last) that shows as many images, and others."""
    for place, sample in enumerate(samples):
        for other in (*samples[place + 1 :], *samples[:place]):
            if len(other["images"]) == len(sample["images"]) and not _shows_the_same(sample, other):
                yield sample, other
                break


def _shows_the_same(one: Sample, other: Sample) -> bool:
    ids = [(sample.get("meta") or {}).get("image_id") for sample in (one, other)]
    return bool(set(one["images"]) & set(other["images"])) or (ids[0] is not None and ids[0] == ids[1])
