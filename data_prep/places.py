"""From what a task names to files on this machine: Hub datasets are fetched, an archive of images is unpacked."""

import lzma
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from .errors import InputError
from .files import hash_json
from .hub import download
from .readers import is_function
from .schema import TaskConfig

# Broken, cut off, encrypted, or packed in a way that Python does not know.
_DAMAGED = (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, zlib.error, lzma.LZMAError)
PATHS = ("train", "validation", "test", "images", "answers")  # the keys of a task that name files or folders


def settle(task: TaskConfig, base_dir: Path, cache: Path) -> TaskConfig:
    """The task with local files for every path, absolute where they were fetched or unpacked. Raises `InputError`."""
    if task.data is not None:
        named = {key: value for key in PATHS if isinstance(value := getattr(task, key), str) and not is_function(value)}
        root = download(task.data, named.values())
        task = task.model_copy(update={key: str(root / value) for key, value in named.items()} | {"data": None})
    if task.images is not None and task.images.endswith(".zip") and not (base_dir / task.images).is_dir():
        task = task.model_copy(update={"images": str(_unpacked(base_dir / task.images, cache / "archives"))})
    return task


def _unpacked(archive: Path, cache: Path) -> Path:
    """The folder with what a .zip holds, unpacked once for each version of the file."""
    try:
        status = archive.stat()
    except OSError:
        raise InputError("no such file", where=archive, field="images") from None
    folder = cache / hash_json([str(archive.resolve()), status.st_size, status.st_mtime_ns])[:32]
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".unpacking-"))
    try:
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():
                _check_entry(entry, archive)
            file.extractall(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except _DAMAGED as error:
        raise InputError(f"cannot be unpacked: {error}", where=archive, field="images") from None
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise InputError(f"cannot be unpacked: {error}", where=archive, field="images") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_entry(entry: zipfile.ZipInfo, archive: Path) -> None:
    """Refuse what is no plain file or folder inside the archive: a link, or a name that leads out of it."""
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    if stat.S_ISLNK(entry.external_attr >> 16):
        problem = f"holds a link, {entry.filename}"
    elif path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", entry.filename):
        problem = f"holds {entry.filename}, which leads out of it"
    else:
        return
    raise InputError(problem, where=archive, field="images", remedy="Unpack it yourself, and look at it")
