import pytest
from PIL import Image

from awares.engine import images
from awares.errors import AwaresError
from awares.method import crops


def test_images_that_cannot_be_used(tmp_path) -> None:
    for size in ((27, 100), (28, 5601)):
        with pytest.raises(AwaresError, match=f"row 7.*{size[0]}x{size[1]}"):
            images.open_image(Image.new("RGB", size), "row 7")
    (tmp_path / "text.png").write_text("no image")
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    for name in ("missing.png", "text.png", "cut.png"):
        with pytest.raises(AwaresError, match=name):
            images.open_image(tmp_path / name)
    with pytest.raises(AwaresError, match="int"):
        images.open_image(3)  # type: ignore[arg-type]


def test_open_image_turns_upright_in_rgb_on_white(tmp_path) -> None:
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert images.open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("L", (40, 80)).save(tmp_path / "side.jpg", exif=exif)
    upright = images.open_image(tmp_path / "side.jpg")
    assert (upright.size, upright.mode) == ((80, 40), "RGB")


def test_sizes_that_the_image_processor_takes() -> None:
    assert images.cap(Image.new("RGB", (4000, 1000))).size == (2000, 500)
    small = Image.new("RGB", (2000, 28))
    assert images.cap(small) is small
    strip = images.open_image(Image.new("RGB", (28, 5600)), "strip")
    for piece in [crops.cut(strip, "left"), crops.low_resolution(strip), images.cap(strip)]:
        assert max(piece.size) <= 200 * min(piece.size)
