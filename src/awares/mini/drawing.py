"""Drawing on a picture: pens, text, shapes, textured grounds, and the effects of a camera.

Evidence has one of two sizes. *Small* is legible at full resolution only, *large* also at half resolution. A `Style`
has their ranges; another style draws evidence of any size, or rows unlike those that the base model was trained on.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from awares.mini.vocabulary import COLOURS, PHRASINGS, SHAPES, UNSEEN_PHRASINGS

Size = tuple[int, int]  # width, height in px
Colour = Sequence[int]  # red, green, blue: 0 to 255
PixelBox = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True)
class Style:
    """What a set of rows looks like; ranges are half-open and in px."""

    small_text: tuple[int, int] = (15, 18)
    large_text: tuple[int, int] = (32, 37)
    small_object: tuple[int, int] = (16, 20)
    large_object: tuple[int, int] = (36, 44)
    faces: tuple[str, ...] = ("DejaVuSans", "DejaVuSerif")  # of matplotlib's fonts
    sizes: tuple[Size, ...] = ((224, 336), (336, 224), (280, 280), (280, 336), (336, 280), (336, 336), (224, 448),
                               (448, 224), (280, 392), (392, 280))  # fmt: skip
    phrasings: Mapping[str, Sequence[str]] = field(default_factory=lambda: PHRASINGS)
    rearranged: bool = False  # values at the edge, above bars and at the side of objects; signs with a coloured frame

    @classmethod
    def graded(cls, px: int) -> "Style":
        """Small evidence of exactly ``px``; what a question names is never smaller than large text, nor than ``px``."""
        low, high = cls.large_text
        return cls((px, px + 1), (max(low, px), max(high, px + 1)), (px, px + 1))

    def side(self, rng: Generator, small: bool) -> int:
        """The side of a small or large object, in px."""
        return int(rng.integers(*(self.small_object if small else self.large_object)))

    def pen(self, rng: Generator, small: bool, dark: bool = True) -> "Pen":
        """A pen of small or large text, dark or light."""
        size = int(rng.integers(*(self.small_text if small else self.large_text)))
        face = str(rng.choice(self.faces))
        fill = tint((30, 30, 40) if dark else (240, 240, 235), rng, 25)
        return Pen(face, size, fill, small, str(rng.choice(["lower", "title"])))


SUITE = Style()
# The shifted rows: one thing differs from all other rows, or everything; images of 400 to 960 visual tokens
SHIFTS = {
    "typeface": Style(faces=("STIXGeneral", "DejaVuSansMono")),
    "phrasing": Style(phrasings=UNSEEN_PHRASINGS),
    "layout": Style(rearranged=True),
    "image size": Style(sizes=((560, 560), (560, 784), (784, 560), (784, 784), (560, 1120), (1120, 560), (1120, 672))),
}
SHIFTS["all four"] = replace(
    SHIFTS["image size"], faces=SHIFTS["typeface"].faces, phrasings=UNSEEN_PHRASINGS, rearranged=True
)


@dataclass(frozen=True)
class Mark:
    """One printed word or drawn object: `text` in lower case, `size` the font or object size in px."""

    text: str
    box: PixelBox
    size: float
    colour: str = ""
    chars: tuple[tuple[str, float], ...] = ()  # (character, x of its centre in px)


@lru_cache(maxsize=256)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"), size)


@lru_cache(maxsize=65536)
def _advance(face: str, size: int, text: str) -> float:
    return _font(face, size).getlength(text)


@lru_cache(maxsize=256)
def _extent(face: str, size: int) -> tuple[int, int]:
    """Top and bottom of a line of text below its anchor, in px, the same for all words."""
    _, top, _, bottom = _font(face, size).getbbox("bdpq")
    return int(top), int(bottom)


@dataclass(frozen=True)
class Pen:
    """Typeface, size in px, colour and case of text, and whether it is small."""

    face: str
    size: int
    fill: tuple[int, int, int]
    small: bool
    case: str = "lower"

    def shrunk(self, rng: Generator, style: Style) -> "Pen":
        """A pen of small text that is not larger than this one."""
        low, high = style.small_text
        return replace(self, size=int(rng.integers(low, min(high, self.size + 1))), small=True)

    def cased(self, text: str) -> str:
        return text.title() if self.case == "title" else text

    def width(self, text: str) -> float:
        return _advance(self.face, self.size, self.cased(text))

    @property
    def height(self) -> int:
        top, bottom = _extent(self.face, self.size)
        return bottom - top


class Canvas:
    """A picture of ``size`` (width, height) px with its marks, on textured ground near the colour ``base``."""

    def __init__(self, style: Style, size: Size, rng: Generator, base: Colour, spread: int, texture: float) -> None:
        self.style, (self.width, self.height) = style, size
        self.image = Image.fromarray(_ground(size, tint(base, rng, spread), rng, texture))
        self.draw = ImageDraw.Draw(self.image)
        self.marks: list[Mark] = []

    def text(self, x: float, y: float, text: str, pen: Pen) -> PixelBox:
        """Write ``text`` with its top left corner at (x, y), one mark per word; return the box of all words."""
        top, bottom = _extent(pen.face, pen.size)
        start, right = round(x), x
        for word in text.split(" "):
            shown = pen.cased(word)
            self.draw.text((start, round(y) - top), shown, font=_font(pen.face, pen.size), fill=pen.fill)
            right = start + _advance(pen.face, pen.size, shown)
            edges = [start + _advance(pen.face, pen.size, shown[:i]) for i in range(len(shown) + 1)]
            chars = tuple((c.lower(), (a + b) / 2) for c, a, b in zip(shown, edges, edges[1:], strict=False))
            self.marks.append(Mark(word.lower(), (start, y, right, y + bottom - top), pen.size, chars=chars))
            start = round(right + _advance(pen.face, pen.size, " "))
        return (x, y, right, y + bottom - top)

    def object(self, x: int, y: int, side: int, shape: str, colour: str, rng: Generator) -> Mark:
        """Draw a shape with its top left corner at (x, y); white without ``colour``."""
        mask = _shape_mask(shape, side)
        self.image.paste(tint(COLOURS.get(colour, (245, 245, 245)), rng, 10), (x, y), mask)
        self.marks.append(Mark(shape, (float(x), float(y), float(x + side), float(y + side)), side, colour))
        return self.marks[-1]


def tint(colour: Colour, rng: Generator, spread: int) -> tuple[int, int, int]:
    """``colour`` with each channel shifted by up to ``spread``."""
    r, g, b = np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return r, g, b


@lru_cache(maxsize=1024)
def _shape_mask(shape: str, side: int) -> Image.Image:
    """Anti-aliased mask of the layers of a shape, ``side`` px square."""
    big = side * 8
    mask = Image.new("L", (big, big), 0)
    draw = ImageDraw.Draw(mask)
    for points, value in SHAPES[shape]:
        if len(points) == 2:
            draw.ellipse([c * (big - 1) for p in points for c in p], fill=value)
        else:
            draw.polygon([(px * big, py * big) for px, py in points], fill=value)
    return mask.resize((side, side), Image.Resampling.BOX)


def _ground(size: Size, base: Colour, rng: Generator, texture: float) -> np.ndarray:
    """A ground of colour ``base`` with a soft gradient and a coarse texture: (height, width, 3) uint8."""
    width, height = size
    coarse = rng.normal(0, texture, (height // 14 + 2, width // 14 + 2)).astype(np.float32)
    cloud = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    slope = rng.normal(0, 8, 2)
    ramp = slope[0] * np.linspace(-1, 1, width)[None, :] + slope[1] * np.linspace(-1, 1, height)[:, None]
    return np.clip(np.asarray(base, np.float32) + (cloud + ramp)[..., None], 0, 255).astype(np.uint8)


def capture(image: Image.Image, rng: Generator) -> bytes:
    """The picture as a camera or scanner captures it, a JPEG file: blur, exposure, sensor noise, compression."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.2, 0.45))))
    pixels = np.asarray(image, np.float32)
    pixels = pixels * rng.uniform(0.88, 1.04) + rng.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 8)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=int(rng.integers(60, 93)))
    return buffer.getvalue()


def free_spot(rng: Generator, taken: list[PixelBox], width: float, height: float, size: Size) -> tuple[int, int] | None:
    """A random corner where a box touches none of ``taken``, which gets it; None after 20 tries."""
    for _ in range(20):
        if width + 4 >= size[0] or height + 4 >= size[1]:
            return None
        x, y = (int(rng.integers(2, int(s - w - 1))) for s, w in zip(size, (width, height), strict=True))
        if all(x > b[2] + 3 or x + width < b[0] - 3 or y > b[3] + 3 or y + height < b[1] - 3 for b in taken):
            taken.append((x, y, x + width, y + height))
            return x, y
    return None


def text_lines(canvas: Canvas, rng: Generator) -> Iterator[tuple[float, float, Pen]]:
    """Start (x, y) and pen of lines down the page: mostly small and dark, some light on a coloured bar."""
    y = float(rng.integers(0, 8))
    while True:
        dark = bool(rng.random() < 0.75)
        pen = canvas.style.pen(rng, bool(rng.random() < 0.75), dark)
        if y + pen.height + 2 > canvas.height:
            return
        if not dark:
            ground = tint(list(COLOURS.values())[int(rng.integers(len(COLOURS)))], rng, 15)
            if sum(ground) < 480:
                canvas.draw.rectangle((0, round(y) - 2, canvas.width, round(y) + pen.height + 1), fill=ground)
            else:
                pen = replace(pen, fill=tint((30, 30, 40), rng, 25))
        yield float(rng.integers(0, 8)), y, pen
        y += pen.height + float(rng.integers(1, 5))
