"""Building one prepared task: read, check, split, limit, name, write."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from .errors import InputError
from .files import hash_json, hash_rows, write_json, write_jsonl
from .gold import Answers
from .identity import choose_groups, give_ids, rank, set_image_ids, split_keys
from .images import ImageFacts, inside, inspect_images, store_image
from .layouts import load_layout
from .readers import Part, is_function, read_rows
from .rows import RawSample, parse_row
from .schema import Message, PrepareConfig, Sample, Style, TaskConfig
from .styles import default_scorer, infer_style, parse, split_prompt, split_reasoning

PARTS: tuple[Part, ...] = ("train", "validation", "test")
_DEFAULT_TEST_SHARE = 0.1
ENOUGH_TO_INFER = 2000  # samples looked at to infer a style


@dataclasses.dataclass(slots=True)
class Item:
    """A sample on its way: `sample["images"]` are names relative to its image folder, `paths` where the files are."""

    sample: Sample
    paths: list[Path]
    where: str


class Builder:
    """One preparation of a task, into an empty folder. `looked_at` are the image files that it depends on.

    Under `on_bad: drop`, `dropped` says why samples were, and `broken` which lines of the files are no JSON.
    """

    def __init__(self, task: TaskConfig, prepare: PrepareConfig, base_dir: Path, folder: Path):
        self.task, self.prepare, self.base_dir, self.folder = task, prepare, base_dir, folder
        self.looked_at: list[Path] = []
        self.roots: list[Path] = []
        self.notes: list[str] = []
        self.dropped: list[InputError] = []
        self.broken: list[InputError] = []
        self.moved = 0
        self.layout = load_layout(task.layout, base_dir)
        self.located: dict[tuple[Path, str], tuple[str, Path]] = {}  # name and file of images, by root and as written

    def build(self) -> None:
        """Write the task's files into the folder. Raises `InputError`."""
        parts: dict[Part, list[Item]] = {"train": []}
        if self.task.train is None and not isinstance(self.task.test, str):
            raise InputError("names no training data and no test data", where=self.task.name)
        if self.task.train is not None:
            parts["train"] = list(self.read("train", self.task.train))
            self._refuse_empty(parts["train"], "train")
        for part, source in self.other_sources().items():
            items = list(self.read(part, source))
            if items or source != self.task.train:
                self._refuse_empty(items, part)
                parts[part] = items
        for items in parts.values():
            give_ids([item.sample for item in items])
        style = self.choose_style(parts)
        if "test" not in parts:
            self._split_off_test(parts)
        self._limit(parts)
        images = self._check_images(parts)
        root = self._place_images(parts, images)
        names = {path: path.relative_to(root).as_posix() for path in images}
        samples: dict[Part, list[Sample]] = {}
        for part in PARTS:
            if part in parts:
                samples[part] = [self._finish(item, part, names) for item in parts[part]]
                if part != "train" or self.task.train is not None:
                    self._refuse_empty(samples[part], part)
                set_image_ids(samples[part], {names[path]: facts.sha256 for path, facts in images.items()})
        self._check_answers(samples)
        self._note_shared_images(samples, {names[path]: facts.sha256 for path, facts in images.items()})
        if self.moved:
            self.notes.append(f"{self.moved} samples show images inside or after a question: they now come first")
        if self.broken:
            self.notes.append(
                f"{len(self.broken)} stretches that are not JSON passed over; the first: {self.broken[0]}"
            )
        if self.dropped:
            self.notes.append(f"{len(self.dropped)} bad samples dropped; the first: {self.dropped[0]}")
        write_task(
            self.folder,
            samples,
            {names[path]: facts for path, facts in images.items()},
            {
                "name": self.task.name,
                "style": style,
                "reasoning": self.task.reasoning,
                "scorer": self._choose_scorer(style, samples),
                "reward": self.task.reward,
                "image_root": "." if root == self.folder else str(root),
                "notes": self.notes,
            },
        )

    @contextlib.contextmanager
    def _sample(self) -> Iterator[None]:
        """What goes wrong inside concerns one sample: an error, or one sample less under `on_bad: drop`."""
        try:
            yield
        except InputError as error:
            if self.prepare.on_bad == "error":
                raise
            self.dropped.append(error)

    def other_sources(self) -> dict[Part, str]:
        """Sources of the validation and test parts. A reader of the training part is asked for those not named."""
        default = self.task.train if self.task.train and is_function(self.task.train) else None
        named = {
            "validation": self.task.validation or default,
            "test": default if self.task.test is None else self.task.test,
        }
        return {part: source for part in PARTS if isinstance(source := named.get(part), str)}

    def read(self, part: Part, source: str) -> Iterator[Item]:
        """The samples of a source, one at a time; their styles, ids and image identities are still to be given."""
        root = self.base_dir if is_function(source) else (self.base_dir / source).parent
        if self.task.images is not None:
            root = self.base_dir / self.task.images
            if not root.is_dir():
                raise InputError("no such folder", where=root, field="images")
        root = Path(os.path.abspath(root))
        self.roots.append(root)
        place = left_out = 0
        answers = Answers(self.base_dir / self.task.answers) if self.task.answers and part == "test" else None
        on_broken = self.broken.append if self.prepare.on_bad == "drop" else None
        rows = read_rows(source, part, self.base_dir, unwrap=self.layout.rows, on_broken=on_broken)
        for place, (where, raw) in enumerate(rows, 1):
            item = None
            with self._sample():
                row = self.layout.read(raw, part, where)
                if row is None:
                    left_out += 1
                    continue
                if answers:
                    row = answers.give(row, place, where)
                item = self._item(parse_row(row, where), root)
            if item is not None:
                yield item
        if answers:
            answers.check_places(place)
        if left_out:
            self.notes.append(f"{part}: {left_out} rows belong to another part of the data (layout {self.task.layout})")

    def _item(self, raw: RawSample, root: Path) -> Item:
        names, paths = [], []
        for image in raw.images:
            if isinstance(image, str):
                name, path = self.located.get((root, image)) or self._locate(image, root, raw.where)
            else:
                name = f"images/{store_image(image, self.folder / 'images', raw.where)}"
                path = self.folder / name
            names.append(name)
            paths.append(path)
        self.moved += raw.moved
        for message in [*raw.prompt, *raw.completion]:
            if message["role"] == "user" and self.task.format and not message["content"].endswith(self.task.format):
                message["content"] = f"{message['content']}\n{self.task.format}".lstrip()
        sample: Sample = {
            "id": raw.id or "",
            "task": self.task.name,
            "images": names,
            "prompt": raw.prompt,
            "completion": raw.completion,
            "references": raw.references or [final_answer(raw.completion)],
            "style": raw.style or self.task.style or cast(Style, ""),
            "reasoning": raw.reasoning or self.task.reasoning,
            "meta": raw.meta,
        }
        if not sample["references"][0]:
            raise InputError("nothing is left of the answer without its thinking", where=raw.where)
        try:
            json.dumps(sample, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"cannot be written as JSON ({error})", where=raw.where) from None
        return Item(sample, paths, raw.where)

    def _locate(self, image: str, root: Path, where: str) -> tuple[str, Path]:
        """The image's name relative to `root`, and its file."""
        name = inside(image, root, where)
        path = root / name
        self.looked_at.append(path)
        if not os.path.isfile(path):  # Path.is_file() raises where a name is too long
            remedy = "Set `images:` of the task to the folder that image paths are relative to"
            raise InputError(f"no such image: {path}", where=where, field="image", remedy=remedy)
        self.located[root, image] = name, path
        return name, path

    def choose_style(self, parts: dict[Part, list[Item]]) -> Style:
        """The task's style: the recipe's, else the rows' most common, else inferred for those that name none."""
        train = [item.sample for item in parts["train"] or parts["test"]]
        style = self.task.style
        if style is None:
            unnamed = [sample for sample in train if not sample["style"]]
            if unnamed:
                looked_at = unnamed[:: max(1, len(unnamed) // ENOUGH_TO_INFER)]
                questions = [last_question(sample) for sample in looked_at]
                style = infer_style([final_answer(sample["completion"]) for sample in looked_at], questions)
                self.notes.append(f"style inferred from the answers: {style}")
            else:
                style = Counter(sample["style"] for sample in train).most_common(1)[0][0]
        formats = [self.task.format] if self.task.format else []
        for items in parts.values():
            for item in items:
                give_style(item.sample, style, formats)
        return style

    def _choose_scorer(self, style: Style, samples: dict[Part, list[Sample]]) -> str:
        if self.task.scorer:
            return self.task.scorer
        scorer = default_scorer(style, min(len(sample["references"]) for sample in samples["test"]))
        self.notes.append(f"scorer inferred from the style: {scorer}")
        return scorer

    def _split_off_test(self, parts: dict[Part, list[Item]]) -> None:
        """Move a share of the images, with every sample that shows them, from train to test: the same ones always.

        Text-only samples are grouped by their question. Groups are taken in the order of their content's hash.
        """
        share = test_share(self.task)
        facts = inspect_images((path for item in parts["train"] for path in item.paths), decode=False)
        parts["train"] = self._without_bad(parts["train"], facts)
        keys = []
        for item in parts["train"]:
            keys.append(split_keys(item.sample, [cast(ImageFacts, facts[path]).sha256 for path in item.paths]))
        try:
            groups, chosen = choose_groups(keys, share)
        except InputError as error:
            raise InputError(error.problem, where=self.task.name, remedy=error.remedy) from None
        parts["test"] = [item for item, group in zip(parts["train"], groups, strict=True) if group in chosen]
        parts["train"] = [item for item, group in zip(parts["train"], groups, strict=True) if group not in chosen]
        self.notes.append(
            f"no test set given: {len(parts['test'])} samples split off, "
            f"those of {len(chosen)} of {len(set(groups))} images or questions"
        )

    def _limit(self, parts: dict[Part, list[Item]]) -> None:
        """Keep at most `limit` samples a part (validation: as test), those with the smallest hash of their id."""
        limit_test = self.prepare.limit.test
        limits = {"train": self.prepare.limit.train, "validation": limit_test, "test": limit_test}
        for part, items in parts.items():
            limit = limits[part]
            if limit is not None and limit < len(items):
                ranked = sorted(items, key=lambda item: rank(item.sample["id"]))
                kept = {item.sample["id"] for item in ranked[:limit]}
                parts[part] = [item for item in items if item.sample["id"] in kept]
                self.notes.append(f"{part}: limited to {limit} of {len(items)} samples")

    def _check_images(self, parts: dict[Part, list[Item]]) -> dict[Path, ImageFacts]:
        """Decode every image of what is kept; samples with a bad one are refused or dropped."""
        facts = inspect_images(path for items in parts.values() for item in items for path in item.paths)
        for part, items in parts.items():
            parts[part] = self._without_bad(items, facts)
        used = {path for items in parts.values() for item in items for path in item.paths}
        return {path: cast(ImageFacts, facts[path]) for path in sorted(used)}

    def _without_bad(self, items: list[Item], facts: dict[Path, ImageFacts | InputError]) -> list[Item]:
        good = []
        for item in items:
            with self._sample():
                for path in item.paths:
                    if isinstance(facts[path], InputError):
                        raise InputError(str(facts[path]), where=item.where, field="image")
                good.append(item)
        return good

    def _place_images(self, parts: dict[Part, list[Item]], images: dict[Path, ImageFacts]) -> Path:
        """The folder that image paths are relative to: the data's own, or this one if some images had no file.

        Then the other images are copied here too, so that a task has one image folder. Changes paths in place.
        """
        stored = {path for path in images if path.is_relative_to(self.folder)}
        if images and not stored:
            shutil.rmtree(self.folder / "images", ignore_errors=True)  # of samples that are not kept
            return Path(os.path.commonpath(self.roots))
        moved = {}
        for path in [path for path in images if path not in stored]:
            moved[path] = self.folder / "images" / f"{images[path].sha256[:32]}{path.suffix.lower()}"
            shutil.copyfile(path, moved[path])
            images[moved[path]] = images.pop(path)
        for items in parts.values():
            for item in items:
                item.paths = [moved.get(path, path) for path in item.paths]
        for path in (self.folder / "images").glob("*"):
            if path not in images:
                path.unlink()
        return self.folder

    def _finish(self, item: Item, part: Part, names: dict[Path, str]) -> Sample:
        """Set image paths; of a dialogue to be scored, the last answer is asked for and all before it is given."""
        sample = item.sample
        sample["images"] = [names[path] for path in item.paths]
        if part != "train":
            turns = [*sample["prompt"], *sample["completion"]]
            sample["prompt"], sample["completion"] = turns[:-1], turns[-1:]
        return sample

    def _refuse_empty(self, items: Sequence[Any], part: str) -> None:
        if not items:
            why = f"All samples are bad; the first: {self.dropped[0]}" if self.dropped else ""
            raise InputError(f"the {part} part is empty", where=self.task.name, remedy=why)

    def _check_answers(self, samples: dict[Part, list[Sample]]) -> None:
        """Gold answers must have the form of their style, or strict scoring could not find anything right."""
        for part, rows in samples.items():
            wrong = [sample for sample in rows if not has_form(sample)]
            if len(wrong) > len(rows) / 2:
                answer, style = final_answer(wrong[0]["completion"]), wrong[0]["style"]
                raise InputError(
                    f"{len(wrong)} of {len(rows)} {part} answers do not have the form of style {style}",
                    where=self.task.name,
                    field=f"sample {wrong[0]['id']}, answer {answer[:60]!r}",
                    remedy="Name another `style:` for the task, or none to have it inferred",
                )
            if wrong:
                first = f"{wrong[0]['id']}: {final_answer(wrong[0]['completion'])[:60]!r}"
                self.notes.append(
                    f"{part}: {len(wrong)} answers do not have the form of their style; the first: {first}"
                )
            untagged = [
                sample
                for sample in rows
                if not split_reasoning(sample["completion"][-1]["content"], sample["reasoning"])[2]
            ]
            if untagged:
                self.notes.append(
                    f"{part}: {len(untagged)} answers are not in the form of reasoning {untagged[0]['reasoning']!r}; "
                    f"the first: {untagged[0]['id']}"
                )

    def _note_shared_images(self, samples: dict[Part, list[Sample]], digests: dict[str, str]) -> None:
        seen = {digests[name] for sample in samples["train"] for name in sample["images"]}
        shared = sum(any(digests[name] in seen for name in sample["images"]) for sample in samples["test"])
        if shared:
            self.notes.append(f"{shared} of {len(samples['test'])} test samples show an image that train shows too")


def write_task(
    folder: Path, samples: dict[Part, list[Sample]], images: dict[str, ImageFacts], task: dict[str, Any]
) -> None:
    """Write a prepared task: parts, `images.json`, and `task.json` (last) from `task` with counts and hashes added."""
    for part, rows in samples.items():
        write_jsonl(folder / f"{part}.jsonl", rows)
    write_json(folder / "images.json", images)
    hashes = {
        part: hash_rows(chain(rows, [{name: images[name].sha256 for row in rows for name in row["images"]}]))
        for part, rows in samples.items()
    }
    write_json(
        folder / "task.json",
        {
            **task,
            "counts": {part: len(samples.get(part, [])) for part in PARTS},
            "hash": hash_json(hashes),
            "train_hash": hashes["train"],
            "test_hash": hashes["test"],
        },
    )


def test_share(task: TaskConfig) -> float:
    """The share of a task's images to split off as its test set. Raises `InputError`."""
    share = _DEFAULT_TEST_SHARE if task.test is None else float(task.test)
    if not 0 < share < 1:
        raise InputError("is no share between 0 and 1 and no file", where=task.name, field="test")
    return share


def give_style(sample: Sample, style: Style, formats: Sequence[str]) -> None:
    """Give a sample that names no style its task's, and an mcq the options that its question lists."""
    sample["style"] = sample["style"] or style
    if sample["style"] == "mcq" and "options" not in sample["meta"]:
        options = split_prompt(last_question(sample), formats)[1]
        if options:
            sample["meta"]["options"] = options


def final_answer(completion: list[Message]) -> str:
    """The last assistant turn's answer, without any thinking."""
    return split_reasoning(completion[-1]["content"], "think")[1]


def last_question(sample: Sample) -> str:
    """The user turn that the last answer is to."""
    turns = [*sample["prompt"], *sample["completion"]]
    return [message["content"] for message in turns if message["role"] == "user"][-1]


def has_form(sample: Sample) -> bool:
    """Whether the gold answer has the form of the sample's style."""
    options = sample["meta"].get("options")
    return parse(sample["style"], final_answer(sample["completion"]), options=options).format_ok
