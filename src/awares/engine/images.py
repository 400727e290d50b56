"""Images: opening, checking, converting to RGB, resizing."""

from pathlib import Path

from PIL import Image, ImageOps

from awares.errors import AwaresFileError, AwaresValueError

MIN_SIDE = 28  # px of one visual token
MAX_ASPECT = 200  # Qwen2.5-VL's image processor refuses longer strips


def open_image(source: str | Path | Image.Image, name: str = "image") -> Image.Image:
    """An upright RGB image from a path or a PIL image, transparency on white; AwaresError names ``name``."""
    if isinstance(source, Image.Image):
        return check_image(ImageOps.exif_transpose(source), name)
    if not isinstance(source, str | Path):
        raise AwaresValueError(f"{name}: {type(source).__name__} is no image: give a path or a PIL image")
    if not Path(source).is_file():
        raise AwaresFileError(f"{name}: no image file {source}")
    try:
        with Image.open(source) as image:
            return check_image(ImageOps.exif_transpose(image), f"{name} ({source})")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise AwaresValueError(f"{name}: {source} is not a readable image ({error})") from error


def check_image(image: Image.Image, name: str, min_side: int = MIN_SIDE) -> Image.Image:
    """``image`` in RGB; AwaresValueError naming ``name`` if it is too small, too long a strip, or cannot be decoded."""
    width, height = image.size
    if min(width, height) < min_side:
        raise AwaresValueError(f"{name}: {width}x{height} px, but each side must have at least {min_side} px")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise AwaresValueError(f"{name}: {width}x{height} px, longer than {MAX_ASPECT}:1")
    return to_rgb(image, name)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """``image`` in RGB, on white where it is transparent; AwaresValueError naming ``name`` if it cannot be decoded."""
    try:
        if image.mode in ("RGBA", "LA") or "transparency" in image.info:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise AwaresValueError(f"{name}: not a readable image ({error})") from error


def cap(image: Image.Image, side: int = 2000) -> Image.Image:
    """The image shrunk, aspect kept, so that neither side exceeds ``side`` px (PAPER §1)."""
    scale = side / max(image.size)
    return image if scale >= 1 else resize(image, round(image.width * scale), round(image.height * scale))


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic. A side below 1/200 of the other is enlarged: the image processor would refuse it."""
    thinnest = -(-max(width, height) // MAX_ASPECT)
    size = (max(width, thinnest), max(height, thinnest))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def enlarge(image: Image.Image) -> Image.Image:
    """A small crop with each side enlarged to at least MIN_SIDE, as the image processor would."""
    return resize(image, max(image.width, MIN_SIDE), max(image.height, MIN_SIDE))
