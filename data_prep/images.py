"""One image: which paths are allowed, what a file's identity and size are, that it decodes, and how it becomes RGB."""

import base64
import hashlib
import io
import os
from pathlib import Path, PurePath
from typing import NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import InputError, printable

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, UnidentifiedImageError)


class ImageFacts(NamedTuple):
    """Identity and size of an image: SHA-256 (hex) of the file's bytes, width and height in pixels."""

    sha256: str
    width: int
    height: int


def load_image(path: Path | str) -> Image.Image:
    """Open an image as RGB, the way the model sees it everywhere. Raises `InputError` if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise InputError("no such image", where=path) from None
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def data_url(path: Path) -> str:
    """An image as a data URL that a server reads as `load_image` does.

    The file as it is where that is so, else a PNG: servers turn pictures as their EXIF data say, and have their own way
    with transparency.
    """
    with Image.open(path) as image:
        plain = image.mode in ("RGB", "L") and not image.info.get("transparency")
        plain = plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        kind = {"JPEG": "image/jpeg", "PNG": "image/png"}.get(image.format or "") if plain else None
    if kind:
        data = Path(path).read_bytes()
    else:
        buffer = io.BytesIO()
        load_image(path).save(buffer, format="PNG", compress_level=1)
        kind, data = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB; transparent parts become white, since ink on nothing would vanish on black."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def inside(name: str, root: Path, where: str) -> str:
    """The path of an image relative to `root` (POSIX). Raises `InputError` for URLs, for paths that leave `root`,
    and for what cannot be written as text.

    The test is on the path as written: a link that the user put into the folder is theirs.
    """
    if name.startswith(("http://", "https://", "data:", "s3://", "gs://")):
        raise InputError(
            f"the image is a URL ({name[:60]})", where=where, field="image", remedy="Download it and give its path"
        )
    if printable(name) != name:
        raise InputError(f"the image path {name!r} is no text", where=where, field="image", remedy="Rename the file")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(base.rstrip(os.sep) + os.sep) or "\0" in name:
        raise InputError(
            f"the image path {name!r} leaves the image folder {base}",
            where=where,
            field="image",
            remedy="Set `images:` of the task to the folder that holds all of its images",
        )
    return PurePath(os.path.relpath(path, base)).as_posix()


def inspect_image(path: Path) -> ImageFacts:
    """Read and fully decode one image file. Raises `InputError` if that fails (missing, truncated, no image)."""
    data = read_image(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return ImageFacts(hashlib.sha256(data).hexdigest(), *image.size)
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def store_image(image: Image.Image | bytes, folder: Path, where: str) -> str:
    """Write an image that has no file into `folder`, under a name made from its content, and return the name.

    A PIL image becomes an RGB PNG named by its pixels (a PNG's bytes differ between zlib versions); encoded bytes are
    kept as they are.
    """
    if isinstance(image, bytes):
        try:
            with Image.open(io.BytesIO(image)) as opened:
                extension = (opened.format or "img").lower().replace("jpeg", "jpg")
        except UNREADABLE as error:
            raise unreadable(where, error, "image") from None
        name, data = f"{hashlib.sha256(image).hexdigest()[:32]}.{extension}", image
    else:
        rgb, buffer = to_rgb(image), io.BytesIO()
        name = f"{hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()[:32]}.png"
        rgb.save(buffer, format="PNG")
        data = buffer.getvalue()
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return name


def read_image(path: Path) -> bytes:
    """The bytes of an image file. Raises `InputError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError("no such image", where=path) from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(where: object, error: Exception, field: str = "") -> InputError:
    """What to say of an image that Pillow could not decode."""
    # PIL's own words name memory addresses ("<_io.BytesIO object at 0x…>"), which say nothing to a user.
    reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error).rstrip(".")
    what = "Shrink" if isinstance(error, Image.DecompressionBombError) else "Replace"
    return InputError(
        f"the image cannot be decoded: {reason}",
        where=where,
        field=field,
        remedy=f"{what} the file, or set prepare.on_bad: drop",
    )
