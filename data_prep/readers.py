"""Rows of a data source: a JSON list, JSON lines or Parquet, told apart by content, or a `module:function` reader."""

import contextlib
import glob
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

from .errors import InputError
from .files import hash_files, read_text
from .json_list import iter_json_list

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(source: str) -> bool:
    """Whether a source names a reader (`package.module:function`) and no file."""
    return _FUNCTION.fullmatch(source) is not None


def read_rows(
    source: str,
    part: Part,
    base_dir: Path,
    *,
    unwrap: Callable[[Any], Iterable[Any]] | None = None,
    on_broken: Callable[[InputError], None] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of data files (relative to `base_dir`) or a reader; a bad file as a whole is an `InputError`.

    Every kind of file is streamed but one that is a single JSON object, in which `unwrap` finds the rows. With
    `on_broken`, what is no JSON inside a list, or a line of JSON lines, is passed over, and reported to it.
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
    for path in source_files(source, base_dir):
        kind = _file_kind(path)
        if kind == "parquet":
            yield from _parquet_rows(path)
        elif kind == "list":
            yield from ((f"{path}: sample {index}", row) for index, row in enumerate(_json_list(path, on_broken), 1))
        elif unwrap is not None and (document := _json_object(path)) is not None:
            yield from _unwrapped(unwrap, document, path)
        else:
            yield from iter_jsonl(path, on_broken)


def source_files(source: str, base_dir: Path) -> list[Path]:
    """The files a source names, relative to `base_dir`: one, or all that a pattern (`data/train-*.parquet`) matches.

    Raises `InputError` if there are none.
    """
    path = base_dir / source
    if path.exists() or not glob.has_magic(source):
        return [path]  # what is missing is refused where it is opened
    if found := sorted(glob.glob(str(path), recursive=True)):
        return [Path(name) for name in found]
    raise InputError("no file matches", where=path)


def source_identity(source: str, base_dir: Path) -> str:
    """SHA-256 (hex) of the data files, or of the code of a reader (its module and the modules beside it).

    Data that a reader fetches from elsewhere are not seen: change its code when they change.
    """
    if is_function(source):
        load_function(source, base_dir)
        folder = Path(str(sys.modules[source.partition(":")[0]].__file__)).parent
        return hash_files(folder.glob("*.py"), folder)
    files = source_files(source, base_dir)
    for path in files:
        _file_kind(path)  # refuses what cannot be read
    return hash_files(files, base_dir)


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


def _json_list(path: Path, on_broken: Callable[[InputError], None] | None) -> Iterator[Any]:
    closed = _is_closed(path)  # a file that breaks off lacks an unknown number of samples: nothing to pass over
    if on_broken is not None and closed and _breaks(path):
        yield from _salvaged(read_text(path).removeprefix("\ufeff"), path, on_broken)
        return
    try:
        yield from iter_json_list(path)
    except InputError as error:
        if not closed or not error.problem.startswith("malformed JSON"):
            raise
        remedy = "If it was published like that, prepare.on_bad: drop passes over what is broken"
        raise InputError(error.problem, where=error.where, remedy=remedy) from None


def _is_closed(path: Path) -> bool:
    """Whether the last character of a file but white space is a closing bracket."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip().endswith(b"]")


def _breaks(path: Path) -> bool:
    """Whether a list is not all JSON."""
    try:
        for _ in iter_json_list(path):
            pass
    except InputError as error:
        return error.problem.startswith("malformed JSON")
    return False


def _salvaged(text: str, path: Path, on_broken: Callable[[InputError], None]) -> Iterator[Any]:
    """The objects of a list that is not all JSON; each stretch between them that is none goes to `on_broken`.

    Bare line breaks and tabs inside strings are let pass: what they stand for is not in doubt. Of a broken row, whole
    objects inside may be left; they have none of the keys of the longest object, which is a row.
    """
    decoder, position = json.JSONDecoder(strict=False), text.index("[") + 1
    found: list[tuple[int, int, dict[str, Any]]] = []
    end = position
    while (start := text.find("{", position)) >= 0:
        try:
            row, position = decoder.raw_decode(text, start)
            found.append((start, position, row))
        except (ValueError, RecursionError):
            position = start + 1
    keys = set(max(found, key=lambda row: row[1] - row[0])[2]) if found else set()
    rows = [row for row in found if not keys.isdisjoint(row[2])]
    for start, stop, row in [*rows, (text.rindex("]"), 0, {})]:
        if stretch := text[end:start].strip(", \t\r\n"):
            line = text.count("\n", 0, text.index(stretch, end)) + 1
            on_broken(InputError(f"not JSON: {stretch[:60]!r}", where=f"{path}:{line}"))
        if row:
            yield row
        end = stop


def _unwrapped(unwrap: Callable[[Any], Iterable[Any]], document: Any, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for index, row in enumerate(unwrap(document), 1):
            yield f"{path}: sample {index}", row
    except InputError:
        raise
    except Exception as error:  # an object of another form, or a user's own function, can fail in any way
        problem = f"the layout finds no rows in it: {type(error).__name__}: {error}"
        raise InputError(problem, where=path, remedy="Look at the file, and at `layout:` of the task") from None


def _json_object(path: Path) -> Any:
    """The value of a file that is one JSON object; `None` where it is one object a line."""
    try:
        return json.loads(read_text(path).removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        where = f"{path}:{error.lineno}:{error.colno}"
        remedy = "The file may be half-written: fetch it again"
        raise InputError(f"malformed JSON: {error.msg}", where=where, remedy=remedy) from None
    except (RecursionError, ValueError) as error:  # nested thousands deep, or a number of thousands of digits
        raise InputError(f"malformed JSON: {error}", where=path) from None


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
