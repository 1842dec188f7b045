"""One task read whole: its samples on disk, and in memory what samples are compared by."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..build import test_share
from ..checks import Lengths
from ..errors import InputError
from ..identity import choose_groups, split_keys
from ..readers import Part
from ..schema import AnchorConfig, Style, TaskConfig
from ..spool import Record, Spool
from ..styles import default_scorer
from ..task_reader import TaskReader
from .pictures import Pictures
from .problems import Findings, Kind, Ref

_EVERY = 5000  # samples between two lines of progress


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
        self.spool = Spool(folder / "samples.spool")
        self.reader = TaskReader(task, "drop", base_dir, folder, pictures, self.spool)
        self.whole = sources is None
        self.sources = self.reader.sources() if sources is None else sources
        self.style: Style = task.style or "short"
        self.scorer = task.scorer or ""
        self.samples: Counter[Part] = Counter()  # that could be read, sound or not
        self.fewest_references: dict[Part, int] = {}  # of a sample
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
        given = isinstance(self.task, AnchorConfig) or self.sources.get("test") not in (None, self.task.train)
        return self.whole and not given and bool(self.samples["train"]) and not self.samples["test"]

    def read(self, show: Callable[[str], None]) -> None:
        """Read every source to its end, or to where it breaks; what cannot be read is among the findings."""
        for part, source in self.sources.items():
            try:
                for record in self.reader.read(part, source):
                    self._note(record)
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
        return map(self._placed, self.spool)

    def record(self, offset: int) -> Record:
        """One of them."""
        return self._placed(*self.spool.at([offset]))

    def split_off(self) -> None:
        """Tell which samples the preparation will split off as the test set."""
        offsets = array("q")

        def keys() -> Iterator[list[str]]:
            for record in self.records():
                if not any(isinstance(self.pictures.found[number], InputError) for number in record.images):
                    offsets.append(record.offset)
                    digests = [self.pictures.sound(number).facts.sha256 for number in record.images]
                    yield split_keys(record.sample, digests)

        try:
            groups, chosen = choose_groups(keys(), test_share(self.task))
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

    def _placed(self, record: Record) -> Record:
        if record.offset in self.held_out:
            record.part = "test"
        return record

    def _note(self, record: Record) -> None:
        part, references = record.part, len(record.sample["references"])
        self.samples[part] += 1
        self.images.setdefault(part, set()).update(record.images)
        self.fewest_references[part] = min(self.fewest_references.get(part, references), references)

    def _report(self, part: Part) -> None:
        """Move what the reader passed over to the findings."""
        for kind, errors in (("row", self.reader.dropped), ("file", self.reader.broken)):
            for error in errors:
                actual = "image" if error.field == "image" else kind
                self.findings.add(cast(Kind, actual), error, task=self.name, part=part)
            errors.clear()

    def _infer(self) -> None:
        """Style and scorer as the preparation infers them: of the training part, or of a test set alone."""
        if self.samples["train"] or self.samples["test"]:
            self.style = self.reader.choose_style()
        held_out = [fewest for part, fewest in self.fewest_references.items() if part != "train"]
        fewest = min(held_out or self.fewest_references.values(), default=1)
        self.scorer = self.task.scorer or default_scorer(self.style, fewest)
