"""Rows of a data source: a JSON list, JSON lines or Parquet, told apart by content, or a `module:function` reader."""

import contextlib
import hashlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

from .errors import InputError
from .files import hash_files
from .json_list import iter_json_list

Part = Literal["train", "validation", "test"]
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(source: str) -> bool:
    """Whether a source names a reader (`package.module:function`) and no file."""
    return _FUNCTION.fullmatch(source) is not None


def read_rows(
    source: str, part: Part, base_dir: Path, *, on_broken: Callable[[InputError], None] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of a data file (relative to `base_dir`) or reader; a bad file as a whole is an `InputError`.

    Every kind of file is streamed. With `on_broken`, a line of JSON lines that is none is passed over, and reported to
    it.
    """
    if is_function(source):
        index, rows = 0, load_function(source, base_dir)
        try:
            for index, row in enumerate(rows(part), 1):
                yield f"{source}: sample {index}", row
        except Exception as error:
            if isinstance(error, InputError):
                raise
            where = f"{source}: sample {index + 1} of {part}"
            raise InputError(f"the reader failed: {type(error).__name__}: {error}", where=where) from error
        return
    path = base_dir / source
    kind = _file_kind(path)
    if kind == "parquet":
        yield from _parquet_rows(path)
    elif kind == "list":
        yield from ((f"{path}: sample {index}", row) for index, row in enumerate(iter_json_list(path), 1))
    else:
        yield from iter_jsonl(path, on_broken)


def source_identity(source: str, base_dir: Path) -> str:
    """SHA-256 (hex) of a data file, or of the code of a reader (its module and the modules beside it).

    Data that a reader fetches from elsewhere are not seen: change its code when they change.
    """
    if is_function(source):
        load_function(source, base_dir)
        folder = Path(str(sys.modules[source.partition(":")[0]].__file__)).parent
        return hash_files(folder.glob("*.py"), folder)
    path = base_dir / source
    _file_kind(path)  # refuses what cannot be read
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_function(spec: str, base_dir: Path) -> Callable[..., Any]:
    """Import `module:function`; modules beside the recipe (`base_dir`) and in the working directory are found too."""
    module_name, _, name = spec.partition(":")
    added = [str(base_dir), str(Path.cwd())]
    sys.path[:0] = added
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's own can fail in any way
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(f"cannot import {module_name} ({kind}{error})", where=spec) from None
    finally:
        for entry in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(entry)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"module {module_name} has no function {name}", where=spec)
    return cast(Callable[..., Any], function)


def iter_jsonl(path: Path, on_broken: Callable[[InputError], None] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each line of a JSONL file, one in memory at a time; blank lines are skipped.

    Lines end at line feeds alone: other Unicode separators may stand inside a JSON string. A line that is no JSON is an
    `InputError`; with `on_broken` it is passed over, and reported to it.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = _decoded(line, path, number)
                if text:
                    yield f"{path}:{number}", _parsed(text, path, number)
            except InputError as error:
                if on_broken is None:
                    raise
                on_broken(error)


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        raise InputError("is not UTF-8", where=f"{path}:{number}", remedy="Save it as UTF-8") from None


def _parsed(text: str, path: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"malformed JSON: {error.msg}",
            where=f"{path}:{number}:{error.colno}",
            remedy="A data file is a JSON list of samples, one JSON object a line, or Parquet",
        ) from None
    except (RecursionError, ValueError) as error:  # nested thousands deep, or a number of thousands of digits
        raise InputError(f"malformed JSON: {error}", where=f"{path}:{number}") from None


def _file_kind(path: Path) -> Literal["parquet", "list", "lines"]:
    """What a data file is, from its first bytes. Raises `InputError` if it is missing, empty or something else."""
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise InputError((error.strerror or str(error)).lower(), where=path) from None
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf")):
        raise InputError("is an archive", where=path, remedy="Unpack it first")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise InputError("is empty", where=path)
    return "list" if text.startswith(b"[") else "lines"


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # here: takes a second, and only Parquet needs it
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    index += 1
                    yield f"{path}: sample {index}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"unreadable Parquet: {error}", where=path) from None
