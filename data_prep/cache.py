"""The content-addressed cache of prepared tasks: folders appear whole, under a name made from what they hold."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .files import hash_files, hash_json, read_json, write_json


def code_identity() -> str:
    """SHA-256 (hex) of the code that prepares data: a change of it makes the cache look again."""
    root = Path(__file__).parent
    return hash_files([*root.glob("*.py"), *root.glob("asd/*.py"), *root.glob("layouts/*.py")], root)


@contextlib.contextmanager
def temporary_folder(cache: Path) -> Iterator[Path]:
    """A folder beside the finished ones, gone at the end unless `publish` has renamed it."""
    (cache / "data").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=cache / "data", prefix=".building-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, cache: Path) -> Path:
    """Rename a complete folder to its content's name; if another process was first, its folder is the same."""
    target = cache / "data" / hash_json(read_json(folder / "task.json"))[:32]
    try:
        os.rename(folder, target)
    except OSError:
        if not (target / "task.json").exists():
            raise
    return target


def remember(cache: Path, key: str, folder: Path, looked_at: Iterable[str]) -> None:
    """Note that the source `key` led to `folder`, given the image files it looked at as they are now."""
    images = {path: _stamp(Path(path)) for path in looked_at}
    write_json(cache / "sources" / f"{key}.json", {"folder": folder.name, "images": images})


def remembered(cache: Path, key: str) -> Path | None:
    """The folder that the source `key` led to, if it exists and no image was changed, added or removed since."""
    record = cache / "sources" / f"{key}.json"
    if not record.exists():
        return None
    noted = read_json(record)
    folder = cache / "data" / noted["folder"]
    if not (folder / "task.json").exists():
        return None
    return folder if all(_stamp(Path(path)) == stamp for path, stamp in noted["images"].items()) else None


def _stamp(path: Path) -> list[int] | None:
    """Size in bytes and time of change in nanoseconds, or `None` for what is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
