"""Hard images, made here, each with the picture that every entry point must see, or none if it must be refused."""

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, features
from published import file_of as encoded

WIDTH, HEIGHT = 96, 64
QUESTION, BOX_1 = "what is it?", [[0, 0, 500, 500]]
RAMP = np.add.outer(8 * np.arange(HEIGHT), 16 * np.arange(WIDTH)) * 31  # grey levels 0 to 62,744 of 16 bits
GREY = Image.fromarray(np.rint(RAMP * 255 / 65535).astype(np.uint8)).convert("RGB")
TURNED = GREY.getchannel(0).transpose(Image.Transpose.ROTATE_180)
COLOURS = Image.merge("RGB", (GREY.getchannel(0), TURNED, Image.new("L", GREY.size, 90)))


@dataclass(frozen=True)
class Case:
    """A row: an image file of its own or `COLOURS` in page.png, and ``values`` in the place of good ones.

    ``right``: the picture to see; None: the row is refused, by name. ``trained``: whether it is a training row.
    """

    right: Image.Image | None
    trained: bool
    values: dict[str, Any] | bytes
    content: bytes = b""
    note: str = ""


def tiff(samples: np.ndarray, bits: int, number: int = 1, photometric: int = 1, order: str = "<") -> bytes:
    """A grey TIFF of one strip; ``number``: 1 unsigned, 2 signed, 3 float. 12-bit samples are packed."""
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12) | pairs[:, 1]
        data = np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8).tobytes()
    else:
        data = samples.astype(f"{order}{'.uif'[number]}{bits // 8}").tobytes()
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 262: photometric, 273: 200, 277: 1, 278: HEIGHT, 279: len(data)}
    entries = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in [*tags.items(), (339, number)]]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return (head + b"".join(entries) + bytes(4)).ljust(200, b"\0") + data


def broken_exif(orientation: int, kind: int = 3) -> bytes:
    """EXIF whose resolution is a text of odd length instead of a fraction; ``kind`` of the orientation: 1 is a byte."""
    entries = struct.pack("<HHIHH", 274, kind, 1, orientation, 0) + struct.pack("<HHI4s", 282, 2, 3, b"72\0\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


def image_cases() -> dict[str, Case]:
    found = dict[str, Case]()

    def add(name: str, content: bytes, suffix: str, right: Image.Image | None = None, note: str = "") -> None:
        found[name] = Case(right, bool(right), {"image": f"{name}{suffix}"}, content, note)

    add("colour", encoded(COLOURS, "PNG"), ".png", COLOURS)
    jpeg, exif = encoded(COLOURS, "JPEG", quality=100, subsampling=0), Image.Exif()
    plain = Image.open(io.BytesIO(jpeg)).convert("RGB")
    for number, turn in enumerate([None, 0, 3, 1, 5, 4, 6, 2], start=1):
        upright = plain if turn is None else plain.transpose(Image.Transpose(turn))
        exif[274] = number
        for name, tags in (("exif", exif.tobytes()), ("broken_exif", broken_exif(number))):
            add(f"{name}{number}", encoded(COLOURS, "JPEG", quality=100, subsampling=0, exif=tags), ".jpg", upright)
    tags = broken_exif(6, kind=1)
    right = plain.transpose(Image.Transpose.ROTATE_270)
    add("byte_exif6", encoded(COLOURS, "JPEG", quality=100, subsampling=0, exif=tags), ".jpg", right)
    add("jfif", jpeg, ".jfif", plain)
    if features.check("avif"):
        avif = encoded(COLOURS, "AVIF", quality=100)
        add("avif", avif, ".avif", Image.open(io.BytesIO(avif)).convert("RGB"))
    # Numbers of more than 8 bits
    deep = Image.fromarray(RAMP.astype(np.uint16))
    add("grey16", encoded(deep, "PNG"), ".png", GREY)
    clear = GREY.copy()
    clear.putpixel((0, 0), (255, 255, 255))
    add("grey16_transparent", encoded(deep, "PNG", transparency=0), ".png", clear)
    add("pgm16", b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + RAMP.astype(">u2").tobytes(), ".pgm", GREY)
    add("tiff16", tiff(RAMP, 16), ".tif", GREY)
    add("tiff16_big_endian", tiff(RAMP, 16, order=">"), ".tiff", GREY)
    add("tiff16_white_is_zero", tiff(65535 - RAMP, 16, photometric=0), ".tif", GREY)
    twelve = np.rint(RAMP // 16 * (255 / 4095)).astype(np.uint8)
    add("tiff12", tiff(RAMP // 16, 12), ".tif", Image.fromarray(twelve).convert("RGB"))
    for name, bits, number in (("int8", 8, 2), ("int16", 16, 2), ("int32", 32, 2), ("uint32", 32, 1), ("float", 32, 3)):
        add(name, tiff(RAMP // 2 ** max(0, 16 - bits) // 2, bits, number), ".tif")
    # Transparency
    veil = COLOURS.convert("RGBA")
    veil.putalpha(0)
    for name, kind in (("rgba", "PNG"), ("rgba_webp", "WEBP"), ("rgba_tiff", "TIFF")):
        add(name, encoded(veil, kind), f".{name[5:] or 'png'}", Image.new("RGB", veil.size, "white"))
    levels = np.arange(WIDTH * HEIGHT, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    on_white = Image.fromarray(np.where(levels == 7, 255, levels)).convert("RGB")
    add("palette", encoded(Image.fromarray(levels).convert("P"), "PNG", transparency=7), ".png", on_white)
    # Metadata, frames
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "word " * 600_000, zip=True)
    text.add_text("note", "none of ours")
    add("metadata", encoded(COLOURS, "PNG", pnginfo=text), ".png", COLOURS)
    frames = [COLOURS, *(Image.new("RGB", COLOURS.size, (9 * n, 0, 0)) for n in range(11))]
    for kind, lossless in (("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(COLOURS, kind, save_all=True, append_images=frames[1:], **lossless)
        add(f"frames_{kind.lower()}", content, f".{kind.lower()}", COLOURS, note="first of 12 frames")
    # Sides
    strip = COLOURS.resize((2200, 30))
    add("strip", encoded(strip, "PNG"), ".png", strip)
    for width, height in ((27, 100), (28, 5601), (1, 1)):
        add(f"size{width}x{height}", encoded(Image.new("RGB", (width, height)), "PNG"), ".png")
    # Broken files
    whole = found["colour"].content
    header = whole[12:16] + struct.pack(">II", 20_000, 20_000) + whole[24:29]
    add("bomb", whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:], ".png")
    add("cut_png", whole[: len(whole) // 2], ".png")
    add("empty", b"", ".png")
    add("text", b"no image", ".png")
    add("heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), ".heic")
    return found


IMAGES = image_cases()


def row_cases() -> dict[str, Case]:
    found = {**IMAGES}

    def add(name: str, answered: bool, trained: bool, raw: bytes = b"", **values: Any) -> None:
        found[name] = Case(COLOURS if answered else None, trained, raw or values)

    add("plain", True, True)
    add("question 中文", True, True, question="它是什么？ ½")
    add("a number as id", True, True, id=7)
    add("unknown key", True, False, colour="red")
    add("boolean as id", False, False, id=True)
    add("fraction as id", False, False, id=1.5)
    bad = [7, "none.png", ".", "rows.jsonl", "", "x" * 5000, "page\0.png", "https://host/page.png"]
    for image in [*bad, "data:image/png;base64," + "A" * 21_000]:
        add(f"image: {image!r:.20}", False, False, image=image)
    add("no image", False, False, b'{"question": "q", "answers": ["a"]}')
    for words in (" ", ["q"], None):
        add(f"question: {words}", False, False, question=words)
    add("question: control token", False, True, question="a <|im_end|> b")
    add("question: half a surrogate pair", False, False, question="\ud83d ?")
    add("question: longer than the context", False, True, question="what " * 15_000)
    add("list", False, False, b"[1, 2]")
    add("cut JSON", False, False, b'{"image": "page.png",')
    add("nested JSON", False, False, b"[" * 100_000)
    add("NaN", False, False, b'{"image": NaN, "question": "q"}')
    add("latin-1", False, False, b'{"image": "page.png", "question": "caf\xe9"}')
    add("answers: none", True, False, answers=[])
    add("answers: empty", True, False, answers=[""])
    boxes = [[0, 0, 99999999999, 5], [500, 0, 100, 500], [1, 2, 3], [0.5, 0, 10, 10], [-1, 0, 10, 10]]
    for box in [*boxes, [0, 0, float("inf"), 10]]:
        add(f"box: {box}", True, False, question_boxes=[box])
    add("split", True, False, split="test")
    return found


CASES = row_cases()
