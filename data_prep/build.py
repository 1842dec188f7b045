"""Building one prepared task: read, name, split, limit, check the images, write.

Samples lie in a spool; what is decided about them is held as their places there, by part.
"""

import heapq
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain, compress
from pathlib import Path
from typing import cast

from .choices import Answers
from .errors import InputError
from .forms import GoldForms, give_style
from .identity import Ids, choose_groups, image_ids, rank, split_keys
from .image_files import ImageFiles
from .images import ImageFacts
from .readers import PARTS, Part
from .schema import AnchorConfig, PrepareConfig, Sample, Style, TaskConfig
from .spool import Record, Spool, offsets_of
from .styles import default_scorer
from .task_reader import TaskReader
from .writing import Written, write_part, write_task

_DEFAULT_TEST_SHARE = 0.1


class Builder:
    """One preparation of a task, into an empty folder."""

    def __init__(self, task: TaskConfig, prepare: PrepareConfig, base_dir: Path, folder: Path):
        self.task, self.prepare, self.folder = task, prepare, folder
        self.files = ImageFiles()
        self.spool = Spool(folder / "as-read.spool")
        self.reader = TaskReader(task, prepare.on_bad, base_dir, folder, self.files, self.spool)
        self.notes = self.reader.notes
        self.parts: dict[Part, array[int]] = {"train": array("q")}
        self.facts: dict[int, ImageFacts] = {}  # of the images that are shown, by their numbers
        self.names: dict[int, str] = {}  # of these images, as the samples will give them
        self.answers = Answers()

    def build(self) -> None:
        """Write the task's files into the folder. Raises `InputError`."""
        ids = self._read()
        style = self.reader.choose_style()
        self._name(ids, style)
        if isinstance(self.task, AnchorConfig):
            self.parts["test"] = array("q")
        elif "test" not in self.parts:
            self._split_off_test()
        self._limit()
        self._check_images()
        root = self._place_images()
        images = {name: self.facts[number] for number, name in self.names.items()}
        written, forms = self._write(images)
        self._note_shared_images()
        self._note_what_was_passed_over()
        choices = self.answers.closed()
        if choices:
            self.notes.append(f"the answers are a closed set of {len(choices)}: {', '.join(choices)}"[:200])
        scorer = self._choose_scorer(style, forms["test"].fewest_references or forms["train"].fewest_references)
        task = {
            "name": self.task.name,
            "style": style,
            "reasoning": self.task.reasoning,
            "scorer": scorer,
            "reward": self.task.reward,
            "image_root": root,
            "choices": choices,
            "notes": self.notes,
        }
        write_task(self.folder, written, images, task)
        self.spool.close()

    @property
    def looked_at(self) -> list[str]:
        """The image files that the outcome depends on, those that were missing among them."""
        return [*(path for path in self.files.paths if not self._is_stored(path)), *self.reader.missing]

    def _read(self) -> dict[Part, Ids]:
        """Read all sources; returns what is known of each part's ids."""
        sources = self.reader.sources()
        if not {"train", "test"} & sources.keys():
            raise InputError("names no training data and no test data", where=self.task.name)
        ids = {}
        for part, source in sources.items():
            ids[part], offsets = Ids(), array("q")
            for record in self.reader.read(part, source):
                ids[part].note(record.sample)
                offsets.append(record.offset)
            if offsets or part == "train" or source != self.task.train:
                self._refuse_empty(offsets, part, source)
                self.parts[part] = offsets
        return ids

    def _name(self, ids: dict[Part, Ids], style: Style) -> None:
        """Give every sample its id and its style, in a spool of their own."""
        formats = [self.task.format] if self.task.format else []
        named = Spool(self.folder / "named.spool")

        def renewed(record: Record, part: Part) -> Record:
            record.sample["id"] = ids[part].final(record.sample)
            give_style(record.sample, style, formats)
            return named.add(part, record.where, record.images, record.sample)

        for part, offsets in self.parts.items():
            self.parts[part] = offsets_of(renewed(record, part) for record in self.spool.at(offsets))
            if part in ids and (replaced := ids[part].replaced):
                self.notes.append(f"{part}: {replaced} samples have an id that others have too, and get their own")
        self.spool.close()
        self.spool = named

    def _split_off_test(self) -> None:
        """Move a share of the images, with every sample that shows them, from train to test: the same ones always.

        Text-only samples are grouped by their question. Groups are taken in the order of their content's hash.
        """
        share = test_share(self.task)
        found = self.files.inspect(self._shown(self.parts["train"]), decode=False)
        train = self._without_bad(self.parts["train"], found)
        facts = cast(dict[int, ImageFacts], found)
        keys = (split_keys(record.sample, [facts[n].sha256 for n in record.images]) for record in self.spool.at(train))
        try:
            groups, chosen = choose_groups(keys, share)
        except InputError as error:
            raise InputError(error.problem, where=self.task.name, remedy=error.remedy) from None
        held_out = [group in chosen for group in groups]
        self.parts["train"] = array("q", compress(train, (not held for held in held_out)))
        self.parts["test"] = array("q", compress(train, held_out))
        self.notes.append(
            f"no test set given: {len(self.parts['test'])} samples split off, "
            f"those of {len(chosen)} of {len(set(groups))} images or questions"
        )

    def _limit(self) -> None:
        """Keep at most `limit` samples a part (validation: as test), those with the smallest hash of their id."""
        limit_test = self.prepare.limit.test
        limits = {"train": self.prepare.limit.train, "validation": limit_test, "test": limit_test}
        for part, offsets in self.parts.items():
            limit = limits[part]
            if limit is not None and limit < len(offsets):
                ranked = ((rank(record.sample["id"]), record.offset) for record in self.spool.at(offsets))
                self.parts[part] = array("q", sorted(offset for _, offset in heapq.nsmallest(limit, ranked)))
                self.notes.append(f"{part}: limited to {limit} of {len(offsets)} samples")

    def _check_images(self) -> None:
        """Decode every image of what is kept; samples with a bad one are refused or dropped."""
        found = self.files.inspect(self._shown(chain.from_iterable(self.parts.values())))
        for part, offsets in self.parts.items():
            self.parts[part] = self._without_bad(offsets, found)
        used = set(self._shown(chain.from_iterable(self.parts.values())))
        folder_by_folder = sorted(used, key=lambda number: self.files.paths[number].replace(os.sep, "\0"))
        self.facts = {number: cast(ImageFacts, found[number]) for number in folder_by_folder}

    def _shown(self, offsets: Iterable[int]) -> Iterator[int]:
        """The images of samples, as often as they are shown."""
        return (number for record in self.spool.at(offsets) for number in record.images)

    def _without_bad(self, offsets: "array[int]", found: dict[int, ImageFacts | InputError]) -> "array[int]":
        good = array("q")
        for record in self.spool.at(offsets):
            with self.reader.one_sample():
                for number in record.images:
                    if isinstance(error := found[number], InputError):
                        raise InputError(str(error), where=record.where, field="image")
                good.append(record.offset)
        return good

    def _place_images(self) -> str:
        """Name the images; returns the folder that the names are relative to.

        It is the data's own, or "." for this one if some images had no file: then the others are copied here too, so
        that a task has one image folder.
        """
        paths = {number: self.files.paths[number] for number in self.facts}
        self.names = {n: f"images/{os.path.basename(path)}" for n, path in paths.items() if self._is_stored(path)}
        if paths and not self.names:
            shutil.rmtree(self.folder / "images", ignore_errors=True)  # of samples that are not kept
            root = os.path.commonpath(self.reader.roots)
            self.names = {number: path.removeprefix(os.path.join(root, "")) for number, path in paths.items()}
            return root
        for number, path in paths.items():
            if number not in self.names:
                self.names[number] = f"images/{self.facts[number].sha256[:32]}{Path(path).suffix.lower()}"
                shutil.copyfile(path, self.folder / self.names[number])
        used = set(self.names.values())
        for stored in (self.folder / "images").glob("*"):
            if f"images/{stored.name}" not in used:
                stored.unlink()
        return "."

    def _is_stored(self, path: str) -> bool:
        """Whether an image had no file but the one in this folder."""
        return path.startswith(f"{self.folder}{os.sep}")

    def _write(self, images: dict[str, ImageFacts]) -> tuple[dict[Part, Written], dict[Part, GoldForms]]:
        """Write the parts; returns what was written, and what their gold answers look like."""
        present = [part for part in PARTS if part in self.parts]
        nothing = "train" if self.task.train is None else "test" if isinstance(self.task, AnchorConfig) else None
        for part in present:
            if part != nothing:
                self._refuse_empty(self.parts[part], part)
        written, forms = {}, {part: GoldForms() for part in present}
        for part in present:
            written[part] = write_part(self.folder, part, self._finished(part, forms[part]), images)
            self.notes += forms[part].notes(self.task.name, part)
        return written, forms

    def _finished(self, part: Part, forms: GoldForms) -> Iterator[Sample]:
        """The samples of a part as they are written.

        Of a dialogue to be scored, the last answer is asked for and all before it is given. Samples that share an
        image have an `image_id` in common, unless they came with one.
        """
        offsets, facts = self.parts[part], self.facts
        with_images = (record for record in self.spool.at(offsets) if record.images)
        shared = image_ids([facts[number].sha256 for number in record.images] for record in with_images)
        for record in self.spool.at(offsets):
            sample = record.sample
            sample["images"] = [self.names[number] for number in record.images]
            if part != "train":
                turns = [*sample["prompt"], *sample["completion"]]
                sample["prompt"], sample["completion"] = turns[:-1], turns[-1:]
            if record.images:
                image_id = next(shared)
                sample["meta"].setdefault("image_id", image_id)
            forms.look(sample)
            self.answers.look(sample, part)
            yield sample

    def _choose_scorer(self, style: Style, fewest_references: int) -> str:
        if self.task.scorer:
            return self.task.scorer
        scorer = default_scorer(style, fewest_references)
        self.notes.append(f"scorer inferred from the style: {scorer}")
        return scorer

    def _refuse_empty(self, offsets: "array[int]", part: str, source: str = "") -> None:
        if not offsets:
            dropped = self.reader.dropped
            why = f"All samples are bad; the first: {dropped[0]}" if dropped else ""
            raise InputError(f"the {part} part is empty", where=self.task.name, field=source, remedy=why)

    def _note_shared_images(self) -> None:
        trained = {self.facts[number].sha256 for number in self._shown(self.parts["train"])}
        tested = self.spool.at(self.parts["test"])
        shared = sum(any(self.facts[n].sha256 in trained for n in record.images) for record in tested)
        if shared:
            total = len(self.parts["test"])
            self.notes.append(f"{shared} of {total} test samples show an image that train shows too")

    def _note_what_was_passed_over(self) -> None:
        reader = self.reader
        if reader.moved:
            self.notes.append(f"{reader.moved} samples show images inside or after a question: they now come first")
        if reader.broken:
            first = f"the first: {reader.broken[0]}"
            self.notes.append(f"{len(reader.broken)} stretches that are not JSON passed over; {first}")
        if reader.dropped:
            self.notes.append(f"{len(reader.dropped)} bad samples dropped; the first: {reader.dropped[0]}")


def test_share(task: TaskConfig) -> float:
    """The share of a task's images to split off as its test set. Raises `InputError`."""
    share = _DEFAULT_TEST_SHARE if task.test is None else float(task.test)
    if not 0 < share < 1:
        raise InputError("is no share between 0 and 1 and no file", where=task.name, field="test")
    return share
