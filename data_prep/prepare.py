"""From a task of a recipe to a folder of plain samples, in a content-addressed cache.

`cache/data/<hash>/` holds `{train,validation,test}.jsonl`, `images.json` (SHA-256, width and height of every image
used), `task.json`, `asd_report.json` after ASD and, where images came without files, `images/`.
`cache/sources/<key>.json` remembers which folder a source led to, with size and time of every image looked at, so that
a second preparation reads nothing but the data file. `cache/asd/` keeps the answers of a model that converts.
"""

import os
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from .asd.conversion import Converter, convert
from .asd.llm import Llm
from .asd.prompts import VERSION
from .asd.report import make_report
from .asd.rules import Rules
from .build import Builder
from .cache import code_identity, publish, remember, remembered, temporary_folder
from .endpoint import Endpoint, Picture
from .errors import InputError
from .files import hash_json, read_json, write_json
from .images import ImageFacts
from .places import settle
from .readers import PARTS, Part, is_function, iter_jsonl, source_identity
from .sample_file import SampleFile
from .schema import AsdConfig, PrepareConfig, PreparedTask, Sample, TaskConfig
from .writing import write_part, write_task


def prepare_task(
    task: TaskConfig,
    prepare: PrepareConfig,
    *,
    seed: int,
    asd: AsdConfig | None,
    base_dir: Path,
    cache: Path,
    show: Callable[[str], None] = lambda line: None,
) -> Path:
    """Prepare a task and return its folder in the cache; what was prepared before is not prepared again.

    Paths of `task` are relative to `base_dir`. `seed` acts on ASD alone: the split, the `limit` subset and the test
    part depend on the data only. `show` gets lines of progress, of a conversion by a model. Raises `InputError` for
    anything wrong with the data or that model's endpoint, before the folder exists.
    """
    base_dir, cache = base_dir.resolve(), cache.resolve()
    task = settle(task, base_dir, cache)
    sources = [source for source in (task.train, task.validation, task.test, task.answers) if isinstance(source, str)]
    if task.layout and is_function(task.layout):
        sources.append(task.layout)
    key = hash_json(
        {
            "code": code_identity(),
            "task": task.model_dump(exclude={"overrides"}),
            "prepare": prepare.model_dump(),
            "base_dir": str(base_dir),
            "data": [source_identity(source, base_dir) for source in sources],
        }
    )
    folder = remembered(cache, key)
    if folder is None:
        with temporary_folder(cache) as temporary:
            builder = Builder(task, prepare, base_dir, temporary)
            builder.build()
            folder = publish(temporary, cache)
        remember(cache, key, folder, builder.looked_at)
    if asd is None or asd.fraction == 0:
        return folder
    return _diversify(folder, asd, seed, [task.format] if task.format else [], cache, show)


def read_task(path: Path | str) -> PreparedTask:
    """Read a prepared task's `task.json`. Raises `InputError`."""
    return cast(PreparedTask, read_json(Path(path) / "task.json"))


def read_samples(path: Path | str, part: Part) -> list[Sample]:
    """Read one part of a prepared task; a part that the task does not have is empty. Raises `InputError`."""
    return list(iter_samples(path, part))


def iter_samples(path: Path | str, part: Part) -> Iterator[Sample]:
    """`read_samples`, one at a time."""
    file = Path(path) / f"{part}.jsonl"
    if file.exists():
        yield from (sample for _, sample in iter_jsonl(file))


def read_images(path: Path | str) -> dict[str, ImageFacts]:
    """Read identity and size of each image, by its path in the samples. Raises `InputError`."""
    return {name: ImageFacts(*facts) for name, facts in read_json(Path(path) / "images.json").items()}


def image_path(path: Path | str, task: PreparedTask, name: str) -> Path:
    """Where the image `name` of a sample of a prepared task is."""
    return Path(path) / task["image_root"] / name


def drop_samples(path: Path, drop: dict[Part, set[str]], reason: str, cache: Path) -> Path:
    """A prepared task without the samples whose ids `drop` lists by part, as a folder of its own in the cache.

    Raises `InputError` if nothing is left to train or test on.
    """
    task, parts = read_task(path), dict[Part, Iterable[Sample]]()
    for part in PARTS:
        dropped = drop.get(part, set())
        left = task["counts"][part] - len(dropped)
        if dropped and not left and part != "validation":
            raise InputError(f"no sample of the {part} part is left: {reason}", where=task["name"])
        if left or part != "validation":
            parts[part] = _without(dropped, iter_samples(path, part))
    notes = [f"{part}: {len(ids)} samples dropped, {reason}" for part, ids in drop.items() if ids]
    return _derive(path, parts, notes, {}, cache)


def _without(dropped: Container[str], samples: Iterable[Sample]) -> Iterator[Sample]:
    return (sample for sample in samples if sample["id"] not in dropped)


def _diversify(
    native: Path, asd: AsdConfig, seed: int, known_formats: list[str], cache: Path, show: Callable[[str], None]
) -> Path:
    """ASD of the training part. It comes after `limit`, so that its share is one of what is really trained on."""
    key = hash_json({"code": code_identity(), "native": native.name, "asd": asd.identity(), "seed": seed})
    folder = remembered(cache, key)
    if folder is None:
        task = read_task(native)
        converter: Converter = Rules()
        if asd.converter == "llm":
            images = read_images(native)
            pictures = {name: Picture(image_path(native, task, name), facts.sha256) for name, facts in images.items()}
            converter = Llm(Endpoint(asd, cache / "asd", VERSION, show), pictures)
        done = convert(SampleFile(native / "train.jsonl"), asd.fraction, seed, converter, known_formats=known_formats)
        report = make_report(done, asd, seed)
        parts: dict[Part, Iterable[Sample]] = {"train": done.after()}
        others = [part for part in PARTS if part == "test" or (part == "validation" and task["counts"][part])]
        parts |= {part: iter_samples(native, part) for part in others}
        folder = _derive(native, parts, [f"ASD: {report['summary']}"], {"asd_report.json": report}, cache)
        remember(cache, key, folder, [])
    return folder


def _derive(
    path: Path, parts: Mapping[Part, Iterable[Sample]], notes: list[str], files: dict[str, Any], cache: Path
) -> Path:
    """A folder like `path` with other samples; its images are linked (copied across file systems), not shared."""
    task, images = read_task(path), read_images(path)
    with temporary_folder(cache) as temporary:
        written = {part: write_part(temporary, part, samples, images) for part, samples in parts.items()}
        used = {name for part in written.values() for name in part.images}
        if task["image_root"] == ".":
            for name in used:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path / name, temporary / name)
                except OSError:
                    shutil.copyfile(path / name, temporary / name)
        for name, value in files.items():
            write_json(temporary / name, value)
        kept = {name: facts for name, facts in images.items() if name in used}
        write_task(temporary, written, kept, {**task, "notes": [*task["notes"], *notes]})
        return publish(temporary, cache)
