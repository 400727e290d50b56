"""Images: reading a file as upright 8-bit RGB, the size limits, resizing."""

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from awares.errors import AwaresFileError, AwaresValueError, faults_of

ImageSource = str | Path | bytes | Image.Image
MIN_SIDE = 28  # px of one visual token
MAX_ASPECT = 200  # Qwen2.5-VL's image processor refuses longer strips
BAND = 256  # rows that are laid on white at a time: a large picture has no second copy with transparency
STRIP_GAP = 28  # px of white between the pictures of a strip
NOTE = "note of awares"  # the key in `Image.info` of a note for the user: "first of 12 frames"
SHOWN = 200  # characters of a user's value in a message
# Files that count as images in a folder, in any case. Pillow cannot read those of the second line: the user is told so.
IMAGE_SUFFIXES = tuple(".apng .avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif".split())
IMAGE_SUFFIXES += (".tiff", ".webp", ".heic", ".heif", ".jxl", ".svg", ".dng")
TURNS = (None, None, *(Image.Transpose(turn) for turn in (0, 3, 1, 5, 4, 6, 2)))  # by EXIF orientation, 1 to 8
_DEEP = (None, "JPEG2000", "PNG", "PPM", "TIFF")  # formats whose mode I;16 has the range 0 to 65535

warnings.filterwarnings("ignore", module="PIL")  # about metadata, which is not used
logging.getLogger("PIL").setLevel(logging.CRITICAL)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB, for metadata of image generators; not 1 MB


def open_image(source: ImageSource, name: str = "image", min_side: int = MIN_SIDE) -> Image.Image:
    """An upright RGB image from a path, the content of a file or a PIL image: the first frame, transparency on white.

    16-bit grey is scaled to 8 bit. AwaresError names ``name`` for a missing or broken file, sides below ``min_side``
    px, a strip longer than 200:1, and numbers without a fixed range (32 bit, signed, float).
    """
    if isinstance(source, str | Path):
        name = f"{name} ({str(source)[:SHOWN]})"
    with faults_of(f"{name}: corrupt or not an image, convert it to PNG or JPEG"):
        if isinstance(source, Image.Image):
            return _upright_rgb(source, name, min_side)
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise AwaresFileError(f"{name}: no such image file")
        # not by its path: Pillow maps such files into memory and scrambles a turned TIFF
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file, Image.open(file) as image:
            return _upright_rgb(image, name, min_side)


def check_size(size: tuple[int, int], name: str, min_side: int = MIN_SIDE) -> None:
    """AwaresValueError naming ``name`` for a (width, height) that is too small, or too long a strip."""
    width, height = size
    if min(size) < min_side:
        raise AwaresValueError(f"{name}: {width}x{height} px, but each side must have at least {min_side} px")
    if max(size) > MAX_ASPECT * min(size):
        raise AwaresValueError(f"{name}: {width}x{height} px, longer than {MAX_ASPECT}:1")


def upright_size(content: bytes) -> tuple[int, int]:
    """(width, height) in px of the upright image, from the header of its file."""
    with Image.open(io.BytesIO(content)) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns a TIFF itself
        return image.size[::-1] if turned else image.size


def is_plain(content: bytes) -> bool:
    """Whether `datasets`, too, reads this file as `open_image` does: 8 bits per number and valid EXIF tags."""
    with suppress(Exception), Image.open(io.BytesIO(content)) as image:  # Pillow raises many types for broken tags
        image.getexif().tobytes()
        return not _is_deep(image)
    return False


def as_png(image: Image.Image, **options: Any) -> bytes:
    """The content of a PNG file; ``options`` of Pillow's writer."""
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def _upright_rgb(image: Image.Image, name: str, min_side: int) -> Image.Image:
    check_size(image.size, name, min_side)
    frames = getattr(image, "n_frames", 1)
    note = f"first of {frames} frames" if frames > 1 and image.tell() == 0 else image.info.get(NOTE)
    image.load()
    turn = TURNS[_orientation(image)]
    if _is_deep(image):
        image = _deep_to_grey(image, name)
    if turn is not None:
        image = image.transpose(turn)
    image = _on_white(image) if image.has_transparency_data else image.convert("RGB")
    image.info = {NOTE: note} if note else {}  # without the orientation, which is wrong now
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if its tag cannot be read. The other tags may be broken."""
    found = 1
    with suppress(Exception):
        value = image.getexif()[ExifTags.Base.Orientation]
        found = int(value[0] if isinstance(value, bytes | tuple) else value)
    return found if found in range(1, 9) else 1


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF" or 2 in _tiff_tag(image, ExifTags.Base.SampleFormat)  # 2: signed


def _tiff_tag(image: Image.Image, tag: int) -> tuple[Any, ...]:
    values = getattr(image, "tag_v2", {}).get(tag, ())
    return values if isinstance(values, tuple) else (values,)


def _deep_to_grey(image: Image.Image, name: str) -> Image.Image:
    """Unsigned grey of 9 to 16 bits as mode L, its whole range scaled to 0 to 255."""
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not sixteen or image.format not in _DEEP or 2 in _tiff_tag(image, ExifTags.Base.SampleFormat):
        raise AwaresValueError(f"{name}: mode {image.mode} has no fixed range: convert it to 8 bits per channel")
    [bits] = _tiff_tag(image, ExifTags.Base.BitsPerSample) or (16,)
    levels = np.rint(np.arange(2**16) * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
    if _tiff_tag(image, ExifTags.Base.PhotometricInterpretation) == (0,):  # white is zero
        levels = 255 - levels
    if isinstance(clear := image.info.get("transparency"), int):
        levels[clear] = 255
    return Image.fromarray(levels[np.asarray(image)])


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):
        layer = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        flat.paste(Image.alpha_composite(white, layer).convert("RGB"), (0, top))
    return flat


def cap(image: Image.Image, side: int = 2000) -> Image.Image:
    """The image shrunk, aspect kept, so that neither side exceeds ``side`` px (PAPER §1); no side below MIN_SIDE."""
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(round(length * scale), min(length, MIN_SIDE)) for length in image.size)
    return resize(image, width, height)


def resize(image: Image.Image, width: int, height: int, resample: int = Image.Resampling.BICUBIC) -> Image.Image:
    """The resampled image. A side below 1/200 of the other is enlarged: the image processor would refuse it."""
    thinnest = -(-max(width, height) // MAX_ASPECT)
    size = (max(width, thinnest), max(height, thinnest))
    return image if size == image.size else image.resize(size, resample)


def join_strip(images: Sequence[Image.Image]) -> Image.Image:
    """The pictures in one strip from left to right, aligned at the top, STRIP_GAP px apart, not resized."""
    width = sum(image.width for image in images) + STRIP_GAP * (len(images) - 1)
    strip = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + STRIP_GAP
    return strip
