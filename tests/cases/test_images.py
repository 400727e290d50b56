"""Every entry point sees the right picture of a hard image file, or refuses that file alone, by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import IMAGES, ImageCase, encoded
from PIL import Image

from awares.data.rows import read_jsonl_rows
from awares.data.sources import fit_image
from awares.engine import images
from awares.engine.rows import picture, picture_sizes
from awares.method import crops

READ = {name: case for name, case in IMAGES.items() if case.right}


def assert_right(found: Image.Image, case: ImageCase, right: Image.Image | None = None) -> None:
    right = right or case.right
    assert right and (found.mode, found.size) == ("RGB", right.size)
    assert found.tobytes() == right.tobytes()


def write(folder: Path, name: str) -> Path:
    file = folder / f"{name}{IMAGES[name].suffix}"
    file.write_bytes(IMAGES[name].content)
    return file


@pytest.mark.parametrize("name", READ)
def test_the_right_picture_from_a_path_bytes_and_an_open_file(name: str, tmp_path: Path) -> None:
    case, file = IMAGES[name], write(tmp_path, name)
    with Image.open(file) as opened:
        for source in (file, str(file), case.content, opened):
            found = images.open_image(source)
            assert_right(found, case)
            assert found.info.get(images.NOTE, "") == case.note
    again = images.open_image(images.cap(found))  # as the engine does
    assert min(again.size) >= images.MIN_SIDE and again.info.get(images.NOTE, "") == case.note
    assert images.upright_size(case.content) == found.size


def test_training_rows_see_the_right_pictures(tmp_path: Path) -> None:
    for name in READ:
        row = {"id": name, "image": write(tmp_path, name).name, "question": "q", "answers": ["a"]}
        with (tmp_path / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    rows = read_jsonl_rows(tmp_path / "rows.jsonl")
    sizes = picture_sizes(rows, 2000)
    for row, size in zip(rows, sizes, strict=True):
        case, found = IMAGES[row["id"]], picture(row, 2000)
        assert case.right and found.size == size
        assert_right(found, case, images.cap(case.right))
    kept = rows.cast_column("image", type(rows.features["image"])(decode=False))
    same = {row["id"] for row in kept if row["image"]["bytes"] == IMAGES[row["id"]].content}
    assert {"colour", "exif6", "rgba", "metadata"} <= same and not same & {"broken_exif6", "grey16", "tiff12"}


@pytest.mark.parametrize("name", ["colour", "exif6", "broken_exif6", "grey16", "strip"])
def test_rows_of_the_hub_are_stored_as_any_reader_shows_them(name: str) -> None:
    case = IMAGES[name]
    stored, (shown,) = fit_image([case.content], 2000)
    assert images.is_plain(stored) and images.open_image(stored).size == shown.size
    assert_right(shown, case, images.cap(case.right))  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_a_large_transparent_image_costs_little_memory(tmp_path: Path) -> None:
    content = encoded(Image.new("RGBA", (7000, 7000), (250, 10, 10, 128)), "PNG")
    (tmp_path / "large.png").write_bytes(content)
    code = "import sys; from awares.engine.images import cap, open_image\n"
    code += "assert cap(open_image(sys.argv[1])).size == (2000, 2000)\n"
    code += "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"  # peak, in KiB
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "large.png"], capture_output=True, text=True)
    assert int(done.stdout) < 600_000, done.stderr


def test_sizes_that_the_image_processor_takes() -> None:
    assert images.cap(Image.new("RGB", (4000, 1000))).size == (2000, 500)
    small = Image.new("RGB", (2000, 28))
    assert images.cap(small) is small
    strip = images.open_image(Image.new("RGB", (28, 5600)), "strip")
    for piece in [crops.cut(strip, "left"), crops.low_resolution(strip), images.cap(strip)]:
        assert max(piece.size) <= 200 * min(piece.size)
