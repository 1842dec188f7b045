"""Reading with errors that name the place, writing that is whole or not at all, hashing that is stable."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from .errors import InputError

Row = TypeVar("Row")


@contextlib.contextmanager
def atomic_open(path: Path | str, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` that replaces it on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, encoding=None if mode == "wb" else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def check_output(path: Path, field: str) -> None:
    """Refuse a place where no file can be written, before work is spent on what is to be written there.

    `field` is the option that named it. Raises `InputError`.
    """
    if path.is_dir():
        raise InputError("is a folder", where=path, field=field, remedy="Name a file")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, not a folder", where=path, field=field, remedy="Name another place")
    if not os.access(parent, os.W_OK):
        raise InputError(f"nothing can be written to {parent}", where=path, field=field, remedy="Name another place")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: undefined is `null`."""
    with atomic_open(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def write_jsonl(path: Path | str, rows: Iterable[Any]) -> None:
    """Write one JSON object a line, atomically."""
    for _ in writing_jsonl(path, rows):
        pass


def writing_jsonl(path: Path | str, rows: Iterable[Row]) -> Iterator[Row]:
    """`write_jsonl` that hands each row on once it is written; the file is there when all have been taken."""
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            yield row


def read_text(path: Path | str) -> str:
    """Read UTF-8 text; a missing or foreign file is an `InputError`."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError("no such file", where=path) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a file", where=path) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", where=path, remedy="Save it as UTF-8") from None


def read_json(path: Path | str) -> Any:
    """Read one JSON value; a malformed file is an `InputError` that names line and column."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None


def read_jsonl(path: Path | str) -> list[Any]:
    """Read one JSON value a line (blank lines are skipped); errors name the line."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines(): text may hold U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise InputError(f"malformed JSON: {error.msg}", where=f"{path}:{number}:{error.colno}") from None
    return rows


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_rows(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) of any number of JSON values in order, each independent of key order and gone once hashed."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def hash_files(paths: Iterable[Path | str], root: Path | str) -> str:
    """SHA-256 (hex) over the names (relative to `root`) and contents of `paths`, independent of their order."""
    entries = []
    for path in paths:
        with open(path, "rb") as file:
            entries.append([os.path.relpath(path, root), hashlib.file_digest(file, "sha256").hexdigest()])
    return hash_json(sorted(entries))


def replace_link(path: Path, target: Path) -> None:
    """Make `path` a symbolic link to `target`, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
