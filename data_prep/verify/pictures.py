"""Every image once: does it decode, what are its bytes and pixels, what does it look like, what is odd about it."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import InputError
from ..image_files import ImageFiles, map_images
from ..images import UNREADABLE, ImageFacts, load_image, read_image, to_rgb, unreadable
from .problems import Severity

_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"BZh", b"\xfd7zXZ")
_ORIENTATION = 0x0112  # EXIF
_EVERY = 500  # images between two lines of progress
HASH_BITS = 256
NEAR = 24  # of the hash's bits may differ between two versions of an image
ALIKE = 64  # of 255: by how much the colours of a cell may differ
_ASPECT = 0.05  # by how much the ratio of the sides may differ
_CANDIDATES = 8  # the nearest images whose pixels are compared


class Picture(NamedTuple):
    """What is known of an image file.

    `pixels` is the SHA-256 of its size and RGB pixels, `hash` its perceptual hash; `remarks` say in what the model sees
    it otherwise than a viewer shows it.
    """

    facts: ImageFacts
    pixels: bytes
    hash: bytes
    remarks: tuple[tuple[Severity, str], ...]


class Pictures(ImageFiles):
    """All images of what is verified, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Picture | InputError] = []

    def look(self, show: Callable[[str], None]) -> None:
        """Decode them all, on all cores. `show` gets lines of progress."""
        for picture in map_images(look_at, self.paths):
            self.found.append(picture)
            if len(self.found) % _EVERY == 0:
                show(f"{len(self.found)} of {len(self.paths)} images")

    def sound(self, number: int) -> Picture:
        """The picture of an image that decodes."""
        picture = self.found[number]
        assert isinstance(picture, Picture)
        return picture


def look_at(path: Path) -> Picture | InputError:
    """Read, decode and describe one image file; what is wrong with it is a value."""
    try:
        data = read_image(path)
        if data.startswith(_ARCHIVES):
            return InputError("is an archive, not an image", where=path, remedy="Unpack it, or replace the file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                remarks, rgb = _remarks(image), to_rgb(image)
    except InputError as error:
        return error
    except UNREADABLE as error:
        return unreadable(path, error)
    facts = ImageFacts(hashlib.sha256(data).hexdigest(), *rgb.size)
    pixels = hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).digest()
    return Picture(facts, pixels, perceptual_hash(rgb), remarks)


def _remarks(image: Image.Image) -> tuple[tuple[Severity, str], ...]:
    remarks: list[tuple[Severity, str]] = []
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        remarks.append(("note", f"mode {image.mode}: transparent parts become white"))
    elif image.mode.startswith(("I", "F")):
        brightest = float(np.max(image.getextrema()))
        if brightest > 255:
            remarks.append(("warning", f"mode {image.mode} with values up to {brightest:g}: above 255 all is white"))
    elif image.mode not in ("RGB", "L", "1", "P"):
        remarks.append(("note", f"mode {image.mode}: converted to RGB"))
    if image.getexif().get(_ORIENTATION, 1) != 1:
        remarks.append(("note", "its EXIF data say that it is to be turned, which is not done"))
    if getattr(image, "n_frames", 1) > 1:
        remarks.append(("note", "several frames, of which the first is shown"))
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        remarks.append(("note", "so many pixels that Pillow warns of a decompression bomb"))
    return tuple(remarks)


def perceptual_hash(rgb: Image.Image) -> bytes:
    """The pHash of an image, 256 bits: which of the 16 × 16 lowest frequencies of its 64 × 64 gray version are high.

    The rule of the package `imagehash` (`phash(hash_size=16)`), with cells averaged when the image is made small.
    """
    from scipy.fft import dctn  # here: takes a while to import, and only workers need it

    gray = np.asarray(rgb.convert("L").resize((64, 64), Image.Resampling.BOX), dtype=np.float64)
    low = dctn(gray)[:16, :16]
    return np.packbits(low > np.median(low)).tobytes()


def near(held: list[int], trained: list[int], pictures: Pictures) -> dict[int, list[tuple[int, int]]]:
    """For each image of `held`, the images of `trained` that are other versions of it, with the distance of the hashes.

    Versions: re-encoded or resized. The hashes find candidates; that their colours agree too is looked up in the files.
    """
    if not held or not trained:
        return {}
    hashes = np.frombuffer(b"".join(pictures.sound(n).hash for n in trained), dtype=np.uint64).reshape(-1, 4)
    rows = max(1, 500_000 // len(trained))  # at once: 16 MB
    found: dict[int, list[tuple[int, int]]] = {}
    for start in range(0, len(held), rows):
        part = held[start : start + rows]
        wanted = np.frombuffer(b"".join(pictures.sound(n).hash for n in part), dtype=np.uint64).reshape(-1, 1, 4)
        distances = np.bitwise_count(wanted ^ hashes).sum(axis=2)
        for number, row in zip(part, distances, strict=True):
            close = np.nonzero(row <= NEAR)[0]
            nearest = sorted((int(row[at]), trained[at]) for at in close if trained[at] != number)[:_CANDIDATES]
            alike = [(other, distance) for distance, other in nearest if _alike(number, other, pictures)]
            if alike:
                found[number] = alike
    return found


def _alike(one: int, other: int, pictures: Pictures) -> bool:
    """Whether two images have the same shape, and nowhere another colour."""
    (_, width, height), (_, other_width, other_height) = pictures.sound(one).facts, pictures.sound(other).facts
    if abs(width * other_height / (other_width * height) - 1) > _ASPECT:
        return False
    # Cells of four pixels and more: what a change of size does to edges averages out.
    cells = min(128, max(16, min(width, height, other_width, other_height) // 4))
    first, second = (_reduced(pictures.paths[number], cells) for number in (one, other))
    return int(np.abs(first - second).max()) <= ALIKE


@lru_cache(maxsize=256)
def _reduced(path: str, cells: int) -> np.ndarray:
    """The mean colours of the cells of an image."""
    return np.asarray(load_image(path).resize((cells, cells), Image.Resampling.BOX), dtype=np.int16)


def leads_out(path: Path, root: Path) -> Path | None:
    """The link on the way to a file of the folder `root` by which it is outside, if it is."""
    if path.is_relative_to(root) and not _inside(path.parent, path.name, root):
        for step in [*reversed(path.relative_to(root).parents), path.relative_to(root)]:
            if os.path.islink(root / step) and not _inside((root / step).parent, step.name, root):
                return root / step
    return None


def _inside(folder: Path, name: str, root: Path) -> bool:
    real, base = os.path.join(_real(folder), name), _real(root)
    if os.path.islink(real):
        real = os.path.realpath(real)
    return real.startswith(base.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=65536)
def _real(folder: Path) -> str:
    return os.path.realpath(folder)
