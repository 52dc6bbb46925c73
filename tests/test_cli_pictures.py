"""Pictures as users have them: broken ones are told in one line, odd ones are read as they are to be seen."""

import numpy as np
import pytest
from PIL import Image

from condense_kernels.cli import CommandError
from condense_kernels.cli.patches import open_picture, read_picture


@pytest.fixture
def photograph():
    levels = np.arange(40 * 60 * 3, dtype=np.int64) * 37 % 251
    return Image.fromarray(levels.reshape(40, 60, 3).astype(np.uint8))


def bomb(path) -> None:
    """A bitmap's header that promises a picture of 200 megapixels."""
    Image.new("1", (1, 1)).save(path, format="BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = (20_000).to_bytes(4, "little") + (10_000).to_bytes(4, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "gif"])
@pytest.mark.parametrize("share", [0, 0.02, 0.5])
def test_a_picture_that_was_cut_off_is_told(tmp_path, photograph, form, share):
    path = tmp_path / f"cut.{form}"
    photograph.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CommandError, match="not a picture that Pillow can read: .*cut") as told:
        read_picture(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.write_text("some text\n"), "cannot identify image file"),
        (lambda path: path.mkdir(), r"\(Is a directory\)"),
        (lambda path: path.symlink_to(path), r"\(Too many levels of symbolic links\)"),
        (lambda path: path.symlink_to("nowhere.png"), "no such file"),
        (bomb, "could be decompression bomb"),
    ],
    ids=["text", "folder", "loop", "dangling", "bomb"],
)
def test_what_is_no_picture_is_told(tmp_path, make, words):
    path = tmp_path / "some.png"
    make(path)
    with pytest.raises(CommandError, match=words) as told:
        read_picture(path)
    assert "Errno" not in str(told.value)


def test_a_picture_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)  # as root may read every file
    with pytest.raises(CommandError, match=r"some\.png \(Permission denied\)$"):
        read_picture(tmp_path / "some.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_odd_sizes_are_read(tmp_path, size):
    path = tmp_path / "odd.png"
    Image.new("RGB", size, (255, 0, 0)).save(path)
    picture = open_picture(path, 28)
    assert picture.shape == (28, 28, 3)
    assert picture[..., 0].min() == 1 and picture[..., 1:].max() == 0


def test_the_first_frame_counts(tmp_path):
    path = tmp_path / "moving.gif"
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(path, save_all=True, append_images=[blue])
    assert read_picture(path).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_that_was_turned(tmp_path, orientation):
    """The corner that the camera wrote first is where Exif says that it was seen: 6 is the upper right one."""
    path = tmp_path / "turned.png"
    picture, exif = Image.new("RGB", (8, 4), "black"), Image.Exif()
    picture.putpixel((0, 0), (255, 255, 255))
    exif[0x112] = orientation
    picture.save(path, exif=exif)
    seen = read_picture(path)
    x, y = seen.width - 1, seen.height - 1
    corner = {1: (0, 0), 2: (x, 0), 3: (x, y), 4: (0, y), 5: (0, 0), 6: (x, 0), 7: (x, y), 8: (0, y)}[orientation]
    assert seen.size == ((8, 4) if orientation < 5 else (4, 8))
    assert seen.getpixel(corner) == (255, 255, 255)


@pytest.mark.filterwarnings("error")
def test_floats_keep_their_levels_and_no_numbers_are_black(tmp_path):
    path = tmp_path / "floats.tiff"
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    levels[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(levels).save(path)
    seen = np.asarray(read_picture(path))[..., 0]
    assert (seen[0, :3] == 0).all() and seen[7, 7] == 255
    assert (np.diff(seen.ravel()[3:].astype(int)) > 0).all()
