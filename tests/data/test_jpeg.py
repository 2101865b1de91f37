"""JPEG files through libjpeg-turbo, beside Pillow, which is the reference for pixels and for what is refused."""

import io
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from mmlab.data import images
from mmlab.data.anyres import image_spec
from mmlab.data.config import ImageDataConfig, ImageTextDataConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.data.images import decode_image, decode_picture, open_image, resize, rgb_pixels
from mmlab.data.jpeg import jpeg_pixels, reduction
from mmlab.data.sample_types import ImageSpec, SampleError

GRIDS: Any = tuple(tuple(grid) for grid in ImageTextDataConfig().grids)


def photo(width: int, height: int) -> Image.Image:
    """Smooth noise with edges: no two parts are alike."""
    small = np.random.default_rng(0).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.SHARPEN)


def jpeg(picture: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PHOTO = photo(67, 45)
FORMS = {
    **{f"{chroma}, {scans}": {"subsampling": chroma, "progressive": scans == "progressive"}
       for chroma in ("4:4:4", "4:2:2", "4:2:0", "4:1:1") for scans in ("sequential", "progressive")},
    **{f"orientation {number}": {"exif": turned(number)} for number in range(10)},
    "RGB, by Adobe's marker": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 2},
    "lowest quality": {"quality": 1},
    "highest quality": {"quality": 100},
}  # fmt: skip


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


@pytest.fixture
def no_pillow(monkeypatch):
    monkeypatch.setattr(images, "_rgb", lambda image: pytest.fail("Pillow decodes it"))


@pytest.mark.parametrize("form", FORMS)
def test_pixels_are_those_of_pillow(no_pillow, form):
    data = jpeg(PHOTO, **FORMS[form])
    pixels, by = rgb_pixels(data)
    assert by == 1 and pixels.flags.c_contiguous and np.array_equal(pixels, pillow(data))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (17, 16)])
def test_small_and_gray_pictures(no_pillow, size):
    for picture in (PHOTO.crop((0, 0, *size)), PHOTO.crop((0, 0, *size)).convert("L")):
        for orientation in (1, 3, 6):
            data = jpeg(picture, exif=turned(orientation))
            assert np.array_equal(rgb_pixels(data)[0], pillow(data))
            assert decode_image(data, ImageSpec(8)).shape == (3, 8, 8)


def test_pillow_decodes_cmyk():
    for transform in (0, 2):  # CMYK and YCCK, by Adobe's marker
        data = bytearray(jpeg(PHOTO.convert("CMYK"), quality=95))
        at = data.index(b"Adobe") + 11
        data[at] = transform
        assert jpeg_pixels(bytes(data), open_image(bytes(data))) is None  # type: ignore[arg-type]
        assert np.array_equal(rgb_pixels(bytes(data))[0], pillow(bytes(data)))


def test_what_pillow_accepts_is_accepted_and_what_it_refuses_is_refused(monkeypatch):
    """The same pixels, or the same reason and sentence, for broken files."""
    draw = np.random.default_rng(0)
    accepted = refused = 0
    for i in range(300):
        data = bytearray(jpeg(PHOTO, **list(FORMS.values())[i % len(FORMS)]))
        if i % 5 == 0:
            data = data[: draw.integers(2, len(data))]
        for at in draw.integers(2, len(data), i % 4):
            data[at] = draw.integers(256)
        results = []
        for decoder in (jpeg_pixels, lambda *_, **__: None):
            monkeypatch.setattr(images, "jpeg_pixels", decoder)
            try:
                results.append(decode_image(bytes(data), ImageSpec(16)))
            except SampleError as error:
                results.append((error.reason, error.message))
        ours, reference = results
        if isinstance(reference, torch.Tensor):
            accepted += 1
            assert isinstance(ours, torch.Tensor) and torch.equal(ours, reference)
        else:
            refused += 1
            assert ours == reference
    assert accepted > 50 and refused > 50


def test_a_file_that_libjpeg_warns_of_is_decoded_by_pillow():
    data = jpeg(PHOTO)
    at = data.index(b"\xff\xda") + 60
    data = data[:at] + b"\xff\xd0" + data[at:]  # a marker among the data, which is skipped
    assert jpeg_pixels(data, open_image(data)) is None  # type: ignore[arg-type]
    assert np.array_equal(rgb_pixels(data)[0], pillow(data))


def test_memory_is_that_of_the_header_that_was_checked():
    small, large = jpeg(PHOTO.crop((0, 0, 16, 16))), jpeg(PHOTO)
    assert jpeg_pixels(large, open_image(small)) is None  # type: ignore[arg-type]
    assert jpeg_pixels(small, open_image(large)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "height", "aspect", "expected"),
    [
        (4000, 3000, "pad", 4),  # 1000 of 672 that are needed
        (4000, 3000, "crop", 4),
        (4000, 3000, "stretch", 4),
        (4000, 3000, "anyres", 2),  # tiles take 672 x 504 pixels
        (4001, 3000, "pad", 1),  # a half pixel would remain
        (4002, 3000, "pad", 2),
        (4000, 2998, "crop", 1),  # the crop would begin half a pixel later
        (1344, 1000, "pad", 2),
        (1342, 1000, "pad", 1),
        (5376, 5376, "stretch", 8),
    ],
)
def test_twice_the_pixels_remain(width, height, aspect, expected):
    spec = ImageSpec(336, aspect, 576, GRIDS if aspect == "anyres" else (), reduce_jpegs=True)
    assert reduction(width, height, spec) == expected
    assert reduction(width, height, ImageSpec(336, aspect, 576, spec.grids)) == 1


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch", "anyres"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_pictures_are_close_and_lie_at_the_same_place(no_pillow, aspect, orientation):
    data = jpeg(photo(768, 512), quality=90, exif=turned(orientation))
    whole = ImageSpec(48, aspect, 16, GRIDS if aspect == "anyres" else ())
    reduced = ImageSpec(48, aspect, 16, whole.grids, reduce_jpegs=True)
    assert rgb_pixels(data, reduced)[1] > 1
    ours, reference = decode_picture(data, reduced), decode_picture(data, whole)
    assert ours.columns == reference.columns and torch.equal(ours.places, reference.places)
    difference = (ours.tiles.int() - reference.tiles.int()).abs().float()
    assert difference.mean() < 2
    shifted = (reference.tiles[..., 1:].int() - reference.tiles[..., :-1].int()).abs().float()
    assert difference.mean() < shifted.mean() / 8  # of a picture that lies an eighth of a pixel away


def test_resizing_a_part_gives_the_pixels_of_a_copy():
    """Torch takes another path for pixels that do not lie one after another."""
    image = torch.from_numpy(np.array(photo(64, 40))).permute(2, 0, 1)
    part = image[:, :, 12:52]
    copy = part.contiguous()
    for size in (17, 90):
        assert torch.equal(resize(image, ImageSpec(size, "crop")), resize(part, ImageSpec(size, "stretch")))
        expected = torch.nn.functional.interpolate(copy[None], (size, size), mode="bicubic", antialias=True)[0]
        assert torch.equal(resize(part, ImageSpec(size, "stretch")), expected)


@pytest.mark.parametrize("reduce", [False, True])
def test_the_setting_reaches_the_decoder_and_the_record_of_encoded_images(reduce):
    model = SimpleNamespace(vision=SimpleNamespace(image_size=8), tokens_per_image=4, newline=object())
    for aspect in ("pad", "anyres"):
        data = ImageTextDataConfig(root="", global_batch=1, micro_batch=1, aspect=aspect, reduce_jpegs=reduce)
        assert image_spec(model, data).reduce_jpegs == reduce
    data = ImageDataConfig(root="", global_batch=1, micro_batch=1, size=8, reduce_jpegs=reduce)
    spec = ImageCollate(data, cast("Any", SimpleNamespace(members=()))).image
    assert spec is not None and spec.form == "data.size=8 data.aspect=crop" + " data.reduce_jpegs=true" * reduce


@pytest.mark.parametrize("kept", [0, 2**26])
def test_an_image_does_not_change_when_another_is_decoded(kept, monkeypatch):
    monkeypatch.setattr("mmlab.data.jpeg.LARGEST_KEPT", kept)
    small, large = photo(16, 16), photo(40, 40)
    for decode in (lambda data: rgb_pixels(data)[0], lambda data: decode_image(data, ImageSpec(16)).numpy()):
        first, second = decode(jpeg(small)), decode(jpeg(ImageOps.invert(small)))
        before = [first.copy(), second.copy()]
        decode(jpeg(large))
        decode(jpeg(small.rotate(90)))
        assert (first == before[0]).all() and (second == before[1]).all() and (first != second).any()


def test_memory_of_decoded_pixels_is_used_again():
    data = jpeg(PHOTO)
    header = cast(Any, open_image(data))
    first, second = (cast(Any, jpeg_pixels(data, header, passing=True))[0] for _ in range(2))
    own = cast(Any, jpeg_pixels(data, header))[0]
    assert np.shares_memory(first, second) and not np.shares_memory(first, own)
