"""What `mcit verify` takes for versions of one image, and what not: the trial that its limits were set by.

    python benchmarks/near_images.py

For images of several kinds prints how many of their re-encoded and resized versions are found, and how many pairs of
different images of that kind are taken for versions of each other.
"""

import io
import itertools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

from mcit.data_prep.images import to_rgb
from mcit.data_prep.mini import tasks
from mcit.data_prep.verify.pictures import Pictures, near

COUNT = 150  # images of a kind


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def scaled(image: Image.Image, by: float) -> Image.Image:
    return image.resize((round(image.width * by), round(image.height * by)), Image.Resampling.BICUBIC)


VERSIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 90": lambda image: jpeg(image, 90),
    "JPEG 50": lambda image: jpeg(image, 50),
    "half size": lambda image: scaled(image, 0.5),
    "1.7 times": lambda image: scaled(image, 1.7),
    "half, JPEG 60": lambda image: jpeg(scaled(image, 0.5), 60),
}


def shapes(rng: random.Random) -> Image.Image:
    image = Image.new("RGB", (160, 120), tuple(rng.randint(120, 255) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        left, top, side = rng.randint(0, 140), rng.randint(0, 100), rng.randint(10, 40)
        form = rng.choice((pen.rectangle, pen.ellipse))
        form((left, top, left + side, top + side), fill=tuple(rng.randint(0, 255) for _ in range(3)))
    return image


def crop(rng: random.Random, photos: list[Image.Image]) -> Image.Image:
    photo, side = rng.choice(photos), rng.randint(120, 300)
    left, top = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    return photo.crop((left, top, left + side, top + side))


def page(rng: random.Random) -> Image.Image:
    """A page of one form, filled in with another number."""
    image, font = Image.new("RGB", (850, 1100), "white"), ImageFont.load_default(22)
    pen = ImageDraw.Draw(image)
    for line in range(40):
        pen.text((60, 40 + 26 * line), f"Field {line}: " + "lorem ipsum dolor sit amet"[: 5 + line % 20], "black", font)
    pen.text((400, 560), f"TOTAL {rng.randint(100, 99999)}.{rng.randint(10, 99)}", "black", font)
    return image


def main() -> None:
    rng = random.Random(0)
    photos = [Image.fromarray(np.asarray(photo)) for photo in load_sample_images().images]
    kinds = {
        name: [to_rgb(row["images"][0]) for row in itertools.islice(getattr(tasks, name)("train"), COUNT)]
        for name in ("digits", "counting", "spatial", "grounding")
    }
    kinds["shapes"] = [shapes(rng) for _ in range(COUNT)]
    kinds["photographs"] = [crop(rng, photos) for _ in range(COUNT)]
    kinds["form"] = [page(rng) for _ in range(COUNT // 3)]
    print("| kind | pixels |", " | ".join(VERSIONS), "| pairs of different images |\n|" + "---|" * (3 + len(VERSIONS)))
    with tempfile.TemporaryDirectory() as folder:
        for kind, images in kinds.items():
            pictures = Pictures()

            def add(image: Image.Image, name: str, pictures: Pictures = pictures, kind: str = kind) -> int:
                path = Path(folder) / f"{kind}-{name}.png"
                image.save(path)
                return pictures.number(str(path))

            own = [add(image, str(index)) for index, image in enumerate(images)]
            versions = {
                name: [add(make(image), f"{index}-{name}") for index, image in enumerate(images)]
                for name, make in VERSIONS.items()
            }
            pictures.look(lambda line: None)
            cells = []
            for numbers in versions.values():
                hits = sum(bool(near([one], [other], pictures)) for one, other in zip(own, numbers, strict=True))
                cells.append(f"{100 * hits / len(own):.0f} %")
            pairs = sum(bool(near([one], [other], pictures)) for one, other in itertools.combinations(own, 2))
            total = len(own) * (len(own) - 1) // 2
            size = f"{images[0].width} × {images[0].height}" if kind != "photographs" else "120 to 300"
            print(f"| {kind} | {size} |", " | ".join(cells), f"| {pairs} of {total} |", flush=True)


if __name__ == "__main__":
    main()
