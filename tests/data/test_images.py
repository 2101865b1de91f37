import io
import resource
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.data.images import PAD_COLOR, decode_image, resize
from mmlab.data.sample_types import ImageSpec, SampleError
from tests.tiny_files import bomb

RED = torch.tensor([255, 0, 0])


def encode(picture: Image.Image, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def gradient(width=40, height=40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, 0 * x + 77], -1).astype(np.uint8))


def decode(data: bytes, size=16, aspect="pad") -> torch.Tensor:
    image = decode_image(data, ImageSpec(size, aspect))
    assert image.shape == (3, size, size) and image.dtype == torch.uint8 and image.is_contiguous()
    return image


def center(image: torch.Tensor) -> torch.Tensor:
    return image[:, image.shape[1] // 2, image.shape[2] // 2].long()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_formats(form):
    options = {} if form == "PNG" else {"quality": 95}
    image = decode(encode(gradient(), form, **options))
    assert (center(image) - torch.tensor([127, 127, 77])).abs().max() <= 6


def test_the_right_size_is_passed_through():
    picture = gradient(16, 16)
    assert np.array_equal(decode(encode(picture)).permute(1, 2, 0).numpy(), np.asarray(picture))


def test_resize_is_pillows_antialiased_bicubic():
    noise = np.random.default_rng(0).integers(0, 256, (97, 97, 3), np.uint8)
    picture = Image.fromarray(noise)
    ours = decode(encode(picture), 24).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    assert abs(ours - pillow).max() <= 2


def test_pad_crop_and_stretch():
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste((255, 0, 0), (10, 0, 30, 20))
    padded = decode(encode(picture), 8, "pad")
    assert padded[:, 0, 0].tolist() == list(PAD_COLOR) and padded[:, -1, -1].tolist() == list(PAD_COLOR)
    assert torch.equal(center(padded), RED) and padded[2, 4, 0] > 200
    assert (decode(encode(picture), 8, "crop").permute(1, 2, 0).long() - RED).abs().max() == 0
    stretched = decode(encode(picture), 8, "stretch")
    assert torch.equal(center(stretched), RED) and stretched[2, 0, 0] > 200
    tall = decode(encode(picture.transpose(Image.Transpose.ROTATE_90)), 8, "pad")
    assert tall[:, 0, 0].tolist() == list(PAD_COLOR) and tall[2, 0, 4] > 200


def test_unknown_aspect_is_a_config_error():
    with pytest.raises(ConfigError, match="Did you mean 'stretch'"):
        decode_image(encode(gradient()), ImageSpec(8, "strech"))


def test_transparency_lies_on_white():
    for mode in ("RGBA", "LA"):
        assert center(decode(encode(Image.new(mode, (16, 16))))).tolist() == [255, 255, 255]
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert center(decode(encode(palette, transparency=0))).tolist() == [255, 255, 255]
    assert center(decode(encode(palette))).tolist() == [0, 0, 0]
    assert center(decode(encode(Image.new("RGB", (16, 16)), transparency=(0, 0, 0)))).tolist() == [
        255,
        255,
        255,
    ]


def test_gray_palette_cmyk_and_16_bit():
    assert center(decode(encode(Image.new("L", (16, 16), 90)))).tolist() == [90] * 3
    assert center(decode(encode(Image.new("1", (16, 16), 1)))).tolist() == [255] * 3
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert (center(decode(encode(cmyk, "JPEG"))) - RED).abs().max() <= 4
    gray = Image.fromarray(np.full((16, 16), 40_000, np.uint16))
    assert gray.mode == "I;16"
    assert center(decode(encode(gray))).tolist() == [40_000 >> 8] * 3


def test_exif_rotation():
    picture = Image.new("RGB", (32, 16), "blue")
    picture.paste((255, 0, 0), (0, 0, 16, 16))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left comes to the top
    image = decode(encode(picture, "JPEG", quality=95, exif=exif), 32, "crop")
    turned = decode(encode(picture, "JPEG", quality=95, exif=exif), 16, "stretch")
    assert image.shape == (3, 32, 32)
    assert turned[0, 2].min() > 200 and turned[2, -3].min() > 200


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_animated_images_give_their_first_frame(form):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert (center(decode(data)) - RED).abs().max() <= 2


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int) -> bytes:
    data = encode(Image.new("RGB", (8, 8)))
    return data[:8] + png_chunk(b"IHDR", struct.pack(">II", width, height) + data[24:29]) + data[33:]


@pytest.mark.parametrize("data", [bomb(), png_of(8000, 8000), png_of(2**31 - 1, 2**31 - 1), png_of(70_000, 1)])
def test_bombs_are_refused_from_the_header(data):
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SampleError) as caught:
        decode_image(data, ImageSpec(16))
    assert caught.value.reason == "pixels"
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50_000  # kB


def test_a_compressed_text_bomb_is_refused():
    data = encode(Image.new("RGB", (8, 8)))
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    start = time.process_time()
    with pytest.raises(SampleError):
        decode_image(data[:33] + text + data[33:], ImageSpec(16))
    assert time.process_time() - start < 1


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(marker) (w) file\nshowpage\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        EPS,  # whatever its member is called
        b"GIF89a" + bytes(40),
        encode(gradient(), "BMP"),
        encode(gradient(), "JPEG")[:300],
        encode(gradient(), "JPEG")[:-60],
        encode(gradient())[:60],
        b"\xff\xd8\xff" + bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"RIFF\x00\x00\x00\x00WEBP" + bytes(100),
    ],
)
def test_unreadable_bytes_are_sample_errors(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SampleError) as caught:
        decode_image(data, ImageSpec(16))
    assert caught.value.reason == "decode"
    assert not list(tmp_path.iterdir())


def test_flipped_bytes_raise_only_sample_errors():
    whole = encode(gradient(), "JPEG")
    generator = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for at in generator.integers(3, len(whole), 3):
            data[at] ^= int(generator.integers(1, 256))
        try:
            decode_image(bytes(data), ImageSpec(16))
        except SampleError as error:
            assert error.reason in ("decode", "pixels")


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_long_thin_images_are_fast(aspect):
    start = time.process_time()
    for shape in ((3, 1, 60_000), (3, 60_000, 1)):
        assert resize(torch.zeros(shape, dtype=torch.uint8), ImageSpec(64, aspect)).shape == (3, 64, 64)
    assert time.process_time() - start < 1
