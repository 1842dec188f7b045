"""One task read whole: its samples on disk, and in memory what samples are compared by."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..build import ENOUGH_TO_INFER, Builder, Item, test_share
from ..checks import Lengths
from ..errors import InputError
from ..identity import choose_groups, split_keys
from ..readers import Part
from ..schema import PrepareConfig, Sample, Style, TaskConfig
from ..styles import default_scorer
from .pictures import Pictures
from .problems import Findings, Kind, Ref

_EVERY = 5000  # samples between two lines of progress


class Record(NamedTuple):
    """A sample as it lies on disk; `images` are numbers of `Pictures`."""

    offset: int
    part: Part
    where: str
    images: list[int]
    sample: Sample


class Entry(NamedTuple):
    """What is kept in memory of a sound sample, to compare it with others."""

    offset: int
    part: Part
    images: tuple[int, ...]
    question: bytes
    answer: bytes
    style: Style


class Scan:
    """A task, the `number`-th of those verified, of which `sources` are read (None: all that it names).

    `folder` is for samples, and for images that have no file. `style` and `scorer` are the task's, or inferred.
    """

    def __init__(
        self,
        number: int,
        task: TaskConfig,
        sources: dict[Part, str] | None,
        *,
        base_dir: Path,
        folder: Path,
        pictures: Pictures,
        findings: Findings,
    ):
        self.number, self.task = number, task
        self.folder, self.pictures, self.findings = folder, pictures, findings
        folder.mkdir(parents=True)
        self.spool = folder / "samples.jsonl"
        self.builder = Builder(task, PrepareConfig(on_bad="drop"), base_dir, folder)
        self.whole = sources is None
        self.sources = dict(sources) if sources is not None else self.builder.other_sources()
        if sources is None and task.train is not None:
            self.sources = {"train": task.train, **self.sources}
        self.style: Style = task.style or "short"
        self.scorer = task.scorer or ""
        self.samples: Counter[Part] = Counter()  # that could be read, sound or not
        self.images: dict[Part, set[int]] = {}
        self.held_out: set[int] = set()  # offsets of the samples that are split off
        self.entries: list[Entry] = []  # by the checks
        self.lengths: dict[Part, Lengths] = {}  # by the checks

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def formats(self) -> list[str]:
        """The task's own format sentence, if it has one."""
        return [self.task.format] if self.task.format else []

    @property
    def lacks_test(self) -> bool:
        """Whether the preparation will split the test set off; known when all is read."""
        given = self.sources.get("test") not in (None, self.task.train)
        return self.whole and not given and bool(self.samples["train"]) and not self.samples["test"]

    def read(self, show: Callable[[str], None]) -> None:
        """Read every source to its end, or to where it breaks; what cannot be read is among the findings."""
        with open(self.spool, "wb") as spool:
            for part, source in self.sources.items():
                try:
                    for item in self.builder.read(part, source):
                        spool.write(self._line(part, item))
                        self._report(part)
                        if self.samples[part] % _EVERY == 0:
                            show(f"{self.name}: {self.samples[part]} samples of {part} read")
                except InputError as error:
                    self._report(part)
                    self.findings.add("file", error, task=self.name, part=part)
                self._report(part)
                if not self.samples[part] and (part == "train" or source != self.task.train):
                    self.findings.add("file", "no sample can be read", task=self.name, part=part, where=source)
        self._infer()

    def records(self) -> Iterator[Record]:
        """The samples that were read, in order."""
        offset = 0
        with open(self.spool, "rb") as spool:
            for line in spool:
                yield self._record(offset, line)
                offset += len(line)

    def record(self, offset: int) -> Record:
        """One of them."""
        with open(self.spool, "rb") as spool:
            spool.seek(offset)
            return self._record(offset, spool.readline())

    def split_off(self) -> None:
        """Tell which samples the preparation will split off as the test set."""
        offsets, keys = [], []
        for record in self.records():
            if not any(isinstance(self.pictures.found[number], InputError) for number in record.images):
                offsets.append(record.offset)
                keys.append(split_keys(record.sample, [self.pictures.sound(n).facts.sha256 for n in record.images]))
        try:
            groups, chosen = choose_groups(keys, test_share(self.task))
        except InputError as error:
            self.findings.add("file", error, task=self.name, part="test", where=self.name)
            return
        self.held_out = {offset for offset, group in zip(offsets, groups, strict=True) if group in chosen}
        self.samples, self.images = Counter(), {}
        for record in self.records():
            self.samples[record.part] += 1
            self.images.setdefault(record.part, set()).update(record.images)

    def complain(self, kind: Kind, problem: InputError | str, record: Record, **more: Any) -> None:
        """One more finding, about a sample; unless others are named, it is the one to leave out."""
        more.setdefault("culprits", [Ref(self.number, record.offset)])
        more.setdefault("where", record.where)
        self.findings.add(kind, problem, task=self.name, part=record.part, sample=record.sample["id"], **more)

    def _line(self, part: Part, item: Item) -> bytes:
        images = [self.pictures.number(path) for path in item.paths]
        self.samples[part] += 1
        self.images.setdefault(part, set()).update(images)
        record = {"part": part, "where": item.where, "images": images, "sample": item.sample}
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"

    def _record(self, offset: int, line: bytes) -> Record:
        value: dict[str, Any] = json.loads(line)
        part: Part = "test" if offset in self.held_out else value["part"]
        return Record(offset, part, value["where"], value["images"], value["sample"])

    def _report(self, part: Part) -> None:
        """Move what the builder passed over to the findings."""
        for kind, errors in (("row", self.builder.dropped), ("file", self.builder.broken)):
            for error in errors:
                actual = "image" if error.field == "image" else kind
                self.findings.add(cast(Kind, actual), error, task=self.name, part=part)
            errors.clear()

    def _infer(self) -> None:
        """Style and scorer as the preparation infers them: of the training part, or of a test set alone."""
        part: Part = "train" if self.samples["train"] else "test"
        styles, references, of_tests = Counter[str](), set[int](), set[int]()
        for record in self.records():
            references.add(len(record.sample["references"]))
            if record.part != "train":
                of_tests.add(len(record.sample["references"]))
            if record.part == part:
                styles[record.sample["style"]] += 1
        wanted = "" if "" in styles else max(styles, key=styles.__getitem__, default="")
        stride, seen, picked = max(1, styles[""] // ENOUGH_TO_INFER), 0, list[Item]()
        for record in self.records():
            if record.part == part and record.sample["style"] == wanted:
                if seen % stride == 0:
                    picked.append(Item(record.sample, [], record.where))
                if wanted:
                    break  # one that names it
                seen += 1
        if picked:
            self.style = self.builder.choose_style({"train": picked, "test": []})
        self.scorer = self.task.scorer or default_scorer(self.style, min(of_tests or references, default=1))
