"""What the tiny model sees: 64×64 pictures of shapes, letters and bar charts, drawn from programs.

Everything asked about a picture is answered from the program that drew it, so every answer (and every step of a
rationale) can be checked exactly. Positions lie on a 2-pixel grid, so a box has few possible coordinates.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels a side
SCALE = 4  # pictures are drawn this much larger, then reduced, which smooths the edges
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (240, 210, 30),
    "purple": (150, 60, 190),
    "orange": (255, 127, 14),
}
SHAPES = ("circle", "square", "triangle", "cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
ORDINALS = ("first", "second", "third", "fourth")
LETTERS = "ACEFHJKLNPRSTUVWXYZ"  # without the letters that a low resolution confuses with others or with digits
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSansMono",
    "STIXGeneral",
    "cmr10",
)


@dataclass(frozen=True)
class Shape:
    """One shape: its corner of the picture, and its centre and radius in pixels."""

    corner: str
    shape: str
    colour: str
    x: int
    y: int
    radius: int

    @property
    def size(self) -> str:
        return "large" if self.radius >= 12 else "small"

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its place from the left, its height in steps of 8 pixels, its box in pixels."""

    place: str
    colour: str
    height: int
    box: tuple[int, int, int, int]


def format_box(box: tuple[int, int, int, int]) -> str:
    """A box in pixels as `[x1, y1, x2, y2]`, normalised to 0–1, two decimals."""
    return "[" + ", ".join(f"{edge / SIZE:.2f}" for edge in box) + "]"


def make_shape(rng: np.random.Generator, corner: str, shape: str, colour: str, size: str | None = None) -> Shape:
    """A shape in `corner`, jittered, small (radius 8) or large (radius 12 or 14)."""
    size = size or rng.choice(["small", "large"])
    radius = 8 if size == "small" else int(rng.choice([12, 14]))
    room = 16 - radius
    dx, dy = (int(2 * rng.integers(-(room // 2), room // 2 + 1)) for _ in range(2))
    column, row = 16 + 32 * ("right" in corner), 16 + 32 * ("bottom" in corner)
    return Shape(corner, shape, colour, column + dx, row + dy, radius)


def make_scene(rng: np.random.Generator, count: int | None = None) -> list[Shape]:
    """1 to 4 shapes of different colours in different corners."""
    count = count or int(rng.integers(1, 5))
    corners = [CORNERS[i] for i in sorted(rng.permutation(4)[:count])]
    colours = rng.permutation(list(COLOURS))[:count]
    return [make_shape(rng, c, str(rng.choice(SHAPES)), str(k)) for c, k in zip(corners, colours, strict=True)]


def make_chart(rng: np.random.Generator) -> list[Bar]:
    """3 or 4 bars of different colours and heights (1 to 7 steps); exactly one is the tallest."""
    count = int(rng.integers(3, 5))
    heights = rng.permutation(np.arange(1, 8))[:count]
    colours = rng.permutation(list(COLOURS))[:count]
    width, slot = 10, SIZE // count
    bars = []
    for i, (height, colour) in enumerate(zip(heights, colours, strict=True)):
        left = 2 * ((slot * i + (slot - width) // 2) // 2)
        bars.append(Bar(ORDINALS[i], str(colour), int(height), (left, 60 - 8 * int(height), left + width, 60)))
    return bars


def _canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Paper tinted more to the right (less red) and to the bottom (less blue), so that a patch shows where it is.

    Qwen2.5-VL's tower has no absolute positions, and so small a model takes very long to infer them.
    """
    fade = np.linspace(255, 205, SIZE * SCALE, dtype=np.float32)
    red, blue = np.broadcast_to(fade[None, :], (len(fade),) * 2), np.broadcast_to(fade[:, None], (len(fade),) * 2)
    image = Image.fromarray(np.stack([red, np.full_like(red, 245), blue], axis=-1).astype(np.uint8))
    return image, ImageDraw.Draw(image)


def _reduce(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Down to 64×64, with a little noise: no two pictures are the same pixel for pixel."""
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    noise = rng.normal(0, 6, pixels.shape).astype(np.float32)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def draw_scene(rng: np.random.Generator, scene: list[Shape]) -> Image.Image:
    """Draw shapes on tinted paper."""
    image, draw = _canvas()
    for item in scene:
        x1, y1, x2, y2 = (SCALE * edge for edge in item.box)
        colour, third = COLOURS[item.colour], (x2 - x1) / 3
        if item.shape == "circle":
            draw.ellipse((x1, y1, x2, y2), fill=colour)
        elif item.shape == "square":
            draw.rectangle((x1, y1, x2, y2), fill=colour)
        elif item.shape == "triangle":
            draw.polygon([(x1, y2), (x2, y2), ((x1 + x2) / 2, y1)], fill=colour)
        else:
            draw.rectangle((x1 + third, y1, x2 - third, y2), fill=colour)
            draw.rectangle((x1, y1 + third, x2, y2 - third), fill=colour)
    return _reduce(image, rng)


def draw_chart(rng: np.random.Generator, chart: list[Bar]) -> Image.Image:
    """Draw a bar chart on tinted paper, with a base line."""
    image, draw = _canvas()
    for bar in chart:
        draw.rectangle([SCALE * edge for edge in bar.box], fill=COLOURS[bar.colour])
    draw.line((0, 60 * SCALE, SIZE * SCALE, 60 * SCALE), fill=(40, 40, 40), width=SCALE)
    return _reduce(image, rng)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size)


def draw_letter(rng: np.random.Generator, letter: str) -> Image.Image:
    """Draw one letter, light on dark, in a random font, tilted and sheared; half of them at 8×8 pixels, as the
    handwritten digits of scikit-learn are."""
    side = 192
    glyph = Image.new("L", (side, side), 0)
    font = _font(str(rng.choice(FONTS)), int(rng.integers(120, 165)))
    stroke = int(rng.integers(2, 11))
    ImageDraw.Draw(glyph).text((side / 2, side / 2), letter, font=font, fill=255, anchor="mm", stroke_width=stroke)
    angle, shear = rng.uniform(-0.22, 0.22), rng.uniform(-0.2, 0.2)
    stretch_x, stretch_y = rng.uniform(0.85, 1.2, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.array([[cos, -sin + shear], [sin, cos]]) @ np.diag([stretch_x, stretch_y])
    centre = np.array([side / 2, side / 2])
    offset = centre - matrix @ centre
    glyph = glyph.transform(
        (side, side), Image.Transform.AFFINE, (*matrix[0], offset[0], *matrix[1], offset[1]), Image.Resampling.BILINEAR
    )
    bounds = glyph.getbbox() or (0, 0, side, side)
    glyph = glyph.crop(bounds)
    if rng.random() < 0.5:
        glyph = glyph.resize((8, 8), Image.Resampling.BOX)
    return place_glyph(rng, glyph)


def place_glyph(rng: np.random.Generator, glyph: Image.Image, steady: bool = False) -> Image.Image:
    """Put a light-on-dark glyph (mode L, any size) on the 64×64 picture, about 40×48 pixels, near the middle.

    `steady`: always of that size, and no more than 2 pixels off.
    """
    if steady:
        width, height, off_x, off_y = 40, 48, 2, 2
    else:
        width, height, off_x, off_y = int(2 * rng.integers(17, 23)), int(2 * rng.integers(21, 26)), 5, 4
    x = (SIZE - width) // 2 + int(rng.integers(-off_x, off_x + 1))
    y = (SIZE - height) // 2 + int(rng.integers(-off_y, off_y + 1))
    canvas = Image.new("L", (SIZE, SIZE), 0)
    canvas.paste(glyph.resize((width, height), Image.Resampling.BICUBIC), (x, y))
    ink = np.asarray(canvas, dtype=np.float32)[..., None] / 255
    ground = np.array([30, 30, 40], np.float32)
    pixels = ground + ink * (np.array([235, 235, 225], np.float32) - ground) + rng.normal(0, 6, (SIZE, SIZE, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
