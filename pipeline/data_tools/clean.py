"""A clean copy of data that `mcit verify` has looked at: what speaks against it left out, and listed."""

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcit.data_prep.errors import InputError
from mcit.data_prep.files import write_jsonl
from mcit.data_prep.forms import give_style
from mcit.data_prep.readers import PARTS, Part
from mcit.data_prep.schema import TaskConfig
from mcit.data_prep.spool import Record
from mcit.data_prep.verify.problems import Ref
from mcit.data_prep.verify.scan import Scan

from ..recipe.loading import write_recipe
from ..recipe.schema import Recipe
from .verify import Verified

# What of a task the clean copy keeps; the other keys say how its sources are read.
_KEPT = ("name", "style", "reasoning", "scorer", "reward", "format", "overrides")


def check_target(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier clean copy, such as the data themselves."""
    if out.exists() and not out.is_dir():
        raise InputError("is a file", where=out, field="--drop-bad", remedy="Name a new folder")
    if out.exists() and not (out / "dropped.jsonl").exists() and any(out.iterdir()):
        raise InputError("is not empty", where=out, field="--drop-bad", remedy="Name a new folder")


def write_clean(verified: Verified, strict: bool, out: Path) -> list[str]:
    """Write what nothing speaks against to `out` as JSON lines (TRL's prompt and completion), and say what was done.

    A recipe's tasks go to `<task>/<part>.jsonl` with a `recipe.yaml` beside them, a data file to `<its name>.jsonl`.
    Images stay where they are, and paths stay relative to their folder; images that have no file are written to
    `images/`. `dropped.jsonl` says what was left out and why. Raises `InputError` if nothing is left of a part.
    """
    check_target(out)
    if len(verified.recipes) > 1:
        raise InputError("one recipe at a time", where="mcit verify", field="--drop-bad")
    bad: dict[Ref, list[str]] = defaultdict(list)
    unread = []
    for problem in verified.findings.against(strict):
        reason = f"{problem.kind}: {problem.problem}"
        for culprit in problem.culprits:
            bad[culprit].append(reason)
        if not problem.culprits:
            place = {"task": problem.task, "part": problem.part, "sample": problem.sample, "where": problem.where}
            unread.append({**place, "reasons": [reason]})
    dropped = list(_dropped(verified, bad))
    lost = Counter((entry["task"], entry["part"]) for entry in dropped)
    _refuse_what_is_lost(verified, lost)
    tasks, lines = {}, []
    for scan in verified.scans:
        folder = out / scan.name if scan.whole else out
        root, files = _place(scan, folder)
        written: dict[str, str] = {}
        for part in PARTS:
            if not scan.samples[part]:
                continue
            left = scan.samples[part] - lost[scan.name, part]
            path = folder / (f"{part}.jsonl" if scan.whole else f"{scan.name}.jsonl")
            write_jsonl(path, _rows(scan, part, bad, files))
            written[part] = str(path.resolve())
            lines.append(f"{left} of {scan.samples[part]} samples of {scan.name} {part}: {path} (--images {root})")
        if scan.whole:
            kept = scan.task.model_dump(include=set(_KEPT))
            tasks[scan.name] = TaskConfig.model_validate({**kept, **written, "images": str(root)})
    write_jsonl(out / "dropped.jsonl", [*dropped, *unread])
    lines.append(f"{len(dropped) + len(unread)} left out: {out / 'dropped.jsonl'}")
    for recipe in verified.recipes:
        write_recipe(_with_tasks(recipe, tasks), out / "recipe.yaml")
        lines.append(f"recipe: {out / 'recipe.yaml'}")
    return lines


def _refuse_what_is_lost(verified: Verified, lost: Counter[tuple[str, str]]) -> None:
    """Refuse a copy in which a task, or a part that its recipe names, would be missing; before anything is written."""
    for scan in verified.scans:
        named = {part for part, source in scan.sources.items() if part == "train" or source != scan.task.train}
        for part in PARTS:
            if (scan.samples[part] or part in named) and scan.samples[part] == lost[scan.name, part]:
                raise InputError(f"nothing is left of the {part} part", where=scan.name, field="--drop-bad")
    read = {scan.name for scan in verified.scans}
    for task in (task for recipe in verified.recipes for task in recipe.sources):
        if task.name not in read:
            raise InputError("nothing of it can be read", where=task.name, field="--drop-bad")


def _place(scan: Scan, folder: Path) -> tuple[Path, dict[int, str]]:
    """The folder that image paths are relative to, and the path of each image in it.

    Once some images had no file, all of the task are copied to `folder`, so that there is one image folder.
    """
    numbers = sorted({number for numbers in scan.images.values() for number in numbers})
    paths = {number: Path(scan.pictures.paths[number]) for number in numbers}
    if not any(path.is_relative_to(scan.folder) for path in paths.values()):
        root = Path(os.path.commonpath(scan.reader.roots)) if scan.reader.roots else folder.resolve()
        return root, {number: path.relative_to(root).as_posix() for number, path in paths.items()}
    names = {}
    for number, path in paths.items():
        picture = scan.pictures.found[number]
        if not isinstance(picture, InputError):
            names[number] = f"images/{picture.facts.sha256[:32]}{path.suffix.lower()}"
            (folder / "images").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / names[number])
    return folder.resolve(), names


def _rows(scan: Scan, part: Part, bad: dict[Ref, list[str]], files: dict[int, str]) -> Iterator[dict[str, Any]]:
    for record in scan.records():
        if record.part == part and Ref(scan.number, record.offset) not in bad:
            give_style(record.sample, scan.style, scan.formats)
            row: dict[str, Any] = {**record.sample, "images": [files[number] for number in record.images]}
            if not row["id"]:
                del row["id"]
            yield row


def _dropped(verified: Verified, bad: dict[Ref, list[str]]) -> Iterator[dict[str, Any]]:
    for ref, reasons in sorted(bad.items()):
        scan = verified.scans[ref.task]
        record: Record = scan.record(ref.offset)
        place = {"task": scan.name, "part": record.part, "sample": record.sample["id"], "where": record.where}
        yield {**place, "reasons": list(dict.fromkeys(reasons))}


def _with_tasks(recipe: Recipe, tasks: dict[str, TaskConfig]) -> Recipe:
    """The recipe with other tasks of the same names."""

    def other(entry: Any) -> Any:
        if isinstance(entry, list):
            return [other(one) for one in entry]
        return tasks[entry.name] if isinstance(entry, TaskConfig) else entry

    return recipe.model_copy(update={"stream": [other(entry) for entry in recipe.stream]})
