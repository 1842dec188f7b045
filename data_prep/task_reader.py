"""Reading a task: rows of its sources, in whatever layout, become samples on disk; what is no sample is refused."""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

from .errors import InputError
from .forms import choose_style, final_answer
from .gold import Answers
from .image_files import ImageFiles
from .images import inside, store_image
from .layouts import load_layout
from .readers import PARTS, Part, is_function, read_rows
from .rows import RawSample, parse_row
from .schema import Reasoning, Sample, Style, TaskConfig
from .spool import Record, Spool
from .styles import THINK


class TaskReader:
    """Reads a task's sources into `spool`, their images into numbers of `files`; `folder` is for images without a file.

    Under `on_bad: drop`, `dropped` says why samples were, and `broken` which lines of the files are no JSON. `missing`
    are the image files that are not there, and `roots` the folders that image paths are relative to.
    """

    def __init__(
        self,
        task: TaskConfig,
        on_bad: Literal["error", "drop"],
        base_dir: Path,
        folder: Path,
        files: ImageFiles,
        spool: Spool,
    ):
        self.task, self.on_bad, self.base_dir, self.folder = task, on_bad, base_dir, folder
        self.files, self.spool = files, spool
        self.layout = load_layout(task.layout, base_dir)
        self.roots: list[Path] = []
        self.missing: list[str] = []
        self.notes: list[str] = []
        self.dropped: list[InputError] = []
        self.broken: list[InputError] = []
        self.moved = 0  # samples with an image elsewhere than before the first question
        self.styles: dict[Part, Counter[str]] = defaultdict(Counter)  # that samples name, or ""

    def sources(self) -> dict[Part, str]:
        """What the parts are read from. A reader of the training part is asked for those that name nothing."""
        default = self.task.train if self.task.train and is_function(self.task.train) else None
        named = {
            "train": self.task.train,
            "validation": self.task.validation or default,
            "test": default if self.task.test is None else self.task.test,
        }
        return {part: source for part in PARTS if isinstance(source := named[part], str)}

    def read(self, part: Part, source: str) -> Iterator[Record]:
        """Read a source, one sample at a time; their styles, ids and image identities are still to be given."""
        root = self._image_root(source)
        self.roots.append(root)
        located: dict[str, tuple[int, str]] = {}  # number and name of images, as written
        place = left_out = 0
        answers = Answers(self.base_dir / self.task.answers) if self.task.answers and part == "test" else None
        on_broken = self.broken.append if self.on_bad == "drop" else None
        rows = read_rows(source, part, self.base_dir, unwrap=self.layout.rows, on_broken=on_broken)
        for place, (where, raw) in enumerate(rows, 1):
            record = None
            with self.one_sample():
                if raw is None:  # which of a layout means that the row is another part's
                    raise InputError("a sample is an object, not null", where=where)
                row = self.layout.read(raw, part, where)
                if row is None:
                    left_out += 1
                    continue
                if answers:
                    if not isinstance(row, dict):
                        raise InputError("a sample is an object", where=where)
                    row = answers.give(row, place, where)
                record = self._record(parse_row(row, where), part, root, located)
            if record:
                self.styles[part][record.sample["style"]] += 1
                yield record
        if answers:
            answers.check_places(place)
        if left_out:
            self.notes.append(f"{part}: {left_out} rows belong to another part of the data (layout {self.task.layout})")

    @contextlib.contextmanager
    def one_sample(self) -> Iterator[None]:
        """What goes wrong inside concerns one sample: an error, or one sample less under `on_bad: drop`."""
        try:
            yield
        except InputError as error:
            if self.on_bad == "error":
                raise
            self.dropped.append(error)

    def choose_style(self) -> Style:
        """The task's style, once all is read: the recipe's, else the samples', else inferred, which is noted."""
        if self.task.style is not None:
            return self.task.style
        part: Part = "train" if self.styles["train"] else "test"
        style = choose_style(self.styles[part], (record.sample for record in self.spool if record.part == part))
        if self.styles[part][""]:
            self.notes.append(f"style inferred from the answers: {style}")
        return style

    def _image_root(self, source: str) -> Path:
        root = self.base_dir if is_function(source) else (self.base_dir / source).parent
        if self.task.images is not None:
            root = self.base_dir / self.task.images
            if not root.is_dir():
                raise InputError("no such folder", where=root, field="images")
        return Path(os.path.abspath(root))

    def _record(self, raw: RawSample, part: Part, root: Path, located: dict[str, tuple[int, str]]) -> Record:
        images = []
        for image in raw.images:
            if isinstance(image, str):
                if image not in located:
                    located[image] = self._locate(image, root, raw.where)
                images.append(located[image])
            else:
                name = f"images/{store_image(image, self.folder / 'images', raw.where)}"
                images.append((self.files.number(f"{self.folder}/{name}"), name))
        self.moved += raw.moved
        reasoning = raw.reasoning or self.task.reasoning
        if ending := self._ending(raw, reasoning):
            for message in [*raw.prompt, *raw.completion]:
                if message["role"] == "user" and not message["content"].endswith(ending):
                    message["content"] = f"{message['content']}\n{ending}".lstrip()
        sample: Sample = {
            "id": raw.id or "",
            "task": self.task.name,
            "images": [name for _, name in images],
            "prompt": raw.prompt,
            "completion": raw.completion,
            "references": raw.references or [final_answer(raw.completion)],
            "style": raw.style or self.task.style or cast(Style, ""),
            "reasoning": reasoning,
            "meta": raw.meta,
        }
        if not sample["references"][0]:
            raise InputError("nothing is left of the answer without its thinking", where=raw.where)
        return self.spool.add(part, raw.where, [number for number, _ in images], sample)

    def _ending(self, raw: RawSample, reasoning: Reasoning) -> str:
        """What a sample's questions have to end with. A row of another style than the task's has its own sentence."""
        if self.task.format:
            return self.task.format if raw.style in (None, self.task.style) else ""
        asked = any("<think>" in message["content"] for message in raw.prompt)  # in a question or a system turn
        return THINK if reasoning == "think" and not asked else ""

    def _locate(self, image: str, root: Path, where: str) -> tuple[int, str]:
        """The image's number, and its name relative to `root`."""
        name = inside(image, root, where)
        path = os.path.join(root, name)
        if not os.path.isfile(path):  # Path.is_file() raises where a name is too long
            self.missing.append(path)
            remedy = "Set `images:` of the task to the folder that image paths are relative to"
            raise InputError(f"no such image: {path}", where=where, field="image", remedy=remedy)
        return self.files.number(path), name
