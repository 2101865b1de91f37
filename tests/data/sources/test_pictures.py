import io
import os

import numpy as np
import pytest
from PIL import Image

from mmlab.config.errors import DataError
from mmlab.data.images import load_rgb
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.pictures import ImageFolder, pictures_of, stored
from mmlab.data.tally import Tally
from tests.tiny_files import bomb, jpeg, png

NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("RGB", "BMP"), ("L", "BMP"), ("1", "BMP"), ("P", "BMP"), ("P", "GIF"), ("L", "GIF")),
        *((mode, "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ],
)
def test_other_formats_keep_their_pixels(mode, kind):
    image = Image.fromarray(NOISE if "A" in mode else NOISE[..., :3]).convert(mode)
    tally = Tally()
    extension, data = stored(encoded(image, kind), "x", tally)
    assert extension == "png" and tally.details == {"converted": 1}
    again = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(again.convert("RGBA")), np.asarray(image.convert("RGBA")))


def test_sixteen_bits_orientation_and_frames():
    deep = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    _, data = stored(encoded(deep, "TIFF"), "x", Tally())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(deep))
    turned = Image.Exif()
    turned[274] = 6
    _, data = stored(encoded(Image.fromarray(NOISE[..., :3]), "TIFF", exif=turned), "x", Tally())
    assert np.array_equal(np.asarray(load_rgb(data)), np.rot90(NOISE[..., :3], -1))
    frames = [Image.new("L", (4, 4), color) for color in (10, 200)]
    for kind in ("GIF", "TIFF"):
        tally = Tally()
        _, data = stored(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "x", tally)
        assert tally.details["first_of_several_frames"] == 1 and load_rgb(data).getpixel((0, 0)) == (10, 10, 10)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>404", "unsupported"),
        (b"", "unsupported"),
        (b"BM", "decode"),
        (jpeg()[:300], "decode"),
        (png()[:50], "decode"),
        (encoded(Image.fromarray(NOISE), "TIFF")[:60], "decode"),
        (bomb(), "pixels"),
        (encoded(Image.new("CMYK", (4, 4)), "TIFF"), "unsupported"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "unsupported"),
        (encoded(Image.new("I", (4, 4)), "TIFF"), "unsupported"),
    ],
)
def test_what_training_could_not_decode_is_named(data, reason):
    with pytest.raises(SampleError) as caught:
        stored(data, "x.jpg", Tally())
    assert caught.value.reason == reason
    for kept in (jpeg(), png()):
        assert stored(kept, "x", Tally())[1] is kept


def test_a_name_is_a_path_in_the_folder_or_an_id(tmp_path):
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for name in ("sub/a.jpg", "000012.jpg", "sub/000.5.png"):
        (root / name).write_bytes(jpeg())
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (tmp_path / "link").symlink_to(root)
    (root / "sub" / "linked.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(root / "pipe.jpg")
    for start in (root, tmp_path / "link"):
        folder, tally = ImageFolder(start), Tally()
        names = {
            "sub/a.jpg": "sub/a.jpg",
            "./sub/../sub/a.jpg": "./sub/../sub/a.jpg",
            f"{root}/sub/a.jpg": "sub/a.jpg",
            f"{tmp_path}/link/sub/a.jpg": "sub/a.jpg",
            "000012": "000012",
            "sub/000.5": "sub/000.5",
            "sub/linked.jpg": "sub/linked.jpg",
        }
        assert {name: folder.read(name, "here", tally).name for name in names} == names
        assert folder.read(["sub/a.jpg"], "here", tally).extension == "jpg"
        for name, reason in {
            **{"../secret.jpg": "outside", f"{tmp_path}/secret.jpg": "outside", f"{root}2/a.jpg": "outside"},
            **{"b.jpg": "missing", "sub": "missing", "pipe.jpg": "missing", "a\0.jpg": "missing", "\ud83d": "missing"},
            **{"": "no-image", " ": "no-image", ".": "outside", "..": "outside"},
        }.items():
            with pytest.raises(SampleError) as caught:
                folder.read(name, "here", tally)
            assert caught.value.reason == reason, name
        assert len(tally.lost) == 10


def test_a_folder_is_required(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is a file; give a folder"):
        ImageFolder(tmp_path / "file")


def test_every_file_is_an_image_or_counted(tmp_path):
    root = tmp_path / "images"
    for name in ("a.JPG", "sub/b.jpeg", "sub/deeper/c.Bmp", "d.heic", "e.txt", "f", ".g.jpg", ".h/i.jpg", "j.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "k.png").touch()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked" / "back").symlink_to(root)
    (root / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    tally = Tally()
    names = [str(path.relative_to(root)) for path in pictures_of(root, tally)]
    assert names == ["a.JPG", "broken.jpg", "linked/k.png", "sub/b.jpeg", "sub/deeper/c.Bmp"]
    assert tally.left_out == {"unsupported .heic": 1, "no image": 3, "hidden": 2}
    texts: dict = {}
    (root / "a.txt").touch()
    tally = Tally()
    assert len(list(pictures_of(root, tally, texts))) == 5
    assert texts == {root / "a": root / "a.txt"} and tally.left_out["text without image"] == 1
