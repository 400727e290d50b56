"""Every entry point sees the right picture of a hard image file, or refuses that file alone, by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import IMAGES, encoded
from PIL import Image

from awares.data.rows import read_jsonl_rows
from awares.data.sources import fit_image
from awares.engine import images
from awares.engine.rows import picture, picture_sizes
from awares.method import crops

READ = {name: case for name, case in IMAGES.items() if case.right}


@pytest.mark.parametrize("name", READ)
def test_the_right_picture_from_every_kind_of_source(name: str, tmp_path: Path) -> None:
    case, file = IMAGES[name], tmp_path / f"{name}{IMAGES[name].suffix}"
    file.write_bytes(case.content)
    assert case.right
    with Image.open(file) as opened:
        for source in (file, str(file), case.content, opened):
            found = images.open_image(source)
            assert (found.mode, found.size, found.tobytes()) == ("RGB", case.right.size, case.right.tobytes())
            assert found.info.get(images.NOTE, "") == case.note
    capped = images.cap(found)
    assert images.open_image(capped).info.get(images.NOTE, "") == case.note  # as the engine does
    assert images.upright_size(case.content) == found.size
    stored, (shown,) = fit_image([case.content], 2000)  # a row of the hub, which any reader must show as we do
    assert images.is_plain(stored) and images.open_image(stored).size == shown.size
    assert (shown.mode, shown.tobytes()) == ("RGB", capped.tobytes())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": file.name, "question": "q", "answers": ["a"]}))
    rows = read_jsonl_rows(tmp_path / "rows.jsonl")
    assert picture_sizes(rows, 2000) == [capped.size] and picture(rows[0], 2000).tobytes() == capped.tobytes()
    (kept,) = rows.cast_column("image", type(rows.features["image"])(decode=False))
    assert (kept["image"]["bytes"] == case.content) == images.is_plain(case.content)


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
