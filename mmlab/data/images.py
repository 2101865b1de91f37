"""From the bytes of an image file to the uint8 tensor that a model takes. Legend: H/W pixels, S the side.

torch is imported where a tensor is made, so that `mmlab shards` reads headers without it.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mmlab.config.fields import check_value
from mmlab.data.anyres import best_grid, fitted_size, places_of
from mmlab.data.aspects import bucket_of, covering
from mmlab.data.config import ANYRES, ASPECTS
from mmlab.data.formats import PIXEL_CAP, SIDE_CAP, image_kind, pictures_among
from mmlab.data.jpeg import TURNED, jpeg_pixels
from mmlab.data.sample_types import ImageSpec, Picture, SampleError

if TYPE_CHECKING:
    from torch import Tensor

PAD_COLOR = (122, 116, 104)
"""CLIP's mean color, with which LLaVA pads an image to a square."""


def decode_image(data: bytes, spec: ImageSpec) -> "Tensor":
    """Decode a JPEG, PNG or WebP file and resize it for the model.

    Args:
        data: the file's bytes.
        spec: side of the square, and how the image becomes square; or the buckets.

    Returns:
        uint8 `[3, S, S]`, or of the bucket's shape, RGB, contiguous.

    Raises:
        SampleError: `pixels` for a header beyond the cap (nothing is decoded), `decode` for anything
            unreadable.
        ConfigError: `spec.aspect` is unknown.
    """
    return resize(_decoded(data, spec)[0], spec)


def decode_picture(data: bytes, spec: ImageSpec) -> Picture:
    """Decode an image file as a vision encoder reads it: one square, or with `anyres` several.

    Raises:
        SampleError, ConfigError: as `decode_image`.
    """
    image, reduced = _decoded(data, spec)
    return picture_of(image, spec, reduced)


def picture_of(image_3HW: "Tensor", spec: ImageSpec, reduced: int = 1) -> Picture:
    """A decoded image, uint8 `[3, H, W]`, as a vision encoder reads it.

    Args:
        image_3HW: the image.
        spec: what the encoder takes.
        reduced: factor by which its sides were reduced when it was decoded; 1: not.
    """
    import torch

    if spec.aspect != ANYRES:
        return Picture(resize(image_3HW, spec)[None], torch.arange(spec.tokens))
    height, width = (side * reduced for side in image_3HW.shape[1:])
    _, columns = best_grid(width, height, spec)
    return Picture(cut(image_3HW, spec, reduced), torch.from_numpy(places_of(width, height, spec)), columns)


def pictures_read(extensions: Iterable[str], spec: ImageSpec | None) -> list[str]:
    """The members that hold the pictures which a model takes of a sample, in order."""
    if spec is None:
        return []
    names = pictures_among(extensions)
    return names if spec.tokens else names[:1]


def _decoded(data: bytes, spec: ImageSpec) -> tuple["Tensor", int]:
    """An image, uint8 `[3, H, W]`, until this thread decodes another; and by how much its sides were reduced."""
    import torch

    with decoding(data):
        pixels, reduced = rgb_pixels(data, spec, passing=True)
    return torch.from_numpy(pixels).permute(2, 0, 1), reduced


@contextmanager
def decoding(data: bytes) -> Iterator[None]:
    """Around decoding an image: what goes wrong is a SampleError `pixels` or `decode`."""
    try:
        yield
    except (TooManyPixels, Image.DecompressionBombError) as error:
        raise SampleError("pixels", str(error)) from None
    except (SampleError, MemoryError):
        raise  # the cap bounds what an image can take, so a lack of memory is not the image's fault
    except Exception as error:  # Pillow's parsers raise nearly anything on broken bytes
        reason = f"unreadable image ({len(data)} bytes): {error or type(error).__name__}"
        raise SampleError("decode", reason) from None


def resize(image_3HW: "Tensor", spec: ImageSpec) -> "Tensor":
    """Resize an image to a square, or to the nearest bucket, bicubic with antialiasing, in uint8 throughout.

    Padding resizes before it pads, and cropping crops before it resizes: the work is bounded by the number of
    pixels, however long and thin the image is.

    Args:
        image_3HW: uint8 `[3, H, W]` with any strides.
        spec: side of the square, and how the image becomes square; or the buckets.

    Returns:
        uint8 `[3, S, S]`, or of the bucket's shape, contiguous.

    Raises:
        ConfigError: `spec.aspect` is unknown.
    """
    import torch

    check_value("aspect", spec.aspect, {"choices": ASPECTS})
    height, width = image_3HW.shape[1:]
    size = spec.size
    if spec.buckets:
        shape = spec.buckets[bucket_of(width, height, spec.buckets)]
        left, top, crop_width, crop_height = covering(width, height, shape)
        return _scale(image_3HW[:, top : top + crop_height, left : left + crop_width], *shape)
    if spec.aspect == "stretch":
        return _scale(image_3HW, size, size)
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scale(image_3HW[:, top : top + side, left : left + side], size, size)
    longest = max(height, width)
    inner = _scale(image_3HW, max(1, round(height * size / longest)), max(1, round(width * size / longest)))
    if inner.shape[1:] == (size, size):
        return inner
    square = torch.tensor(PAD_COLOR, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    top, left = (size - inner.shape[1]) // 2, (size - inner.shape[2]) // 2
    square[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return square


def cut(image_3HW: "Tensor", spec: ImageSpec, reduced: int = 1) -> "Tensor":
    """Cut a picture into its base view and its tiles (`anyres`).

    The base view is the whole picture, stretched to a square. For the tiles it is resized, its shape kept, to fit into
    the grid, and centered on black.

    Args:
        image_3HW: uint8 `[3, H, W]` with any strides.
        spec: side, and the grids to choose from.
        reduced: see `picture_of`.

    Returns:
        uint8 `[1 + rows * columns, 3, S, S]`.
    """
    import torch

    size = spec.size
    height, width = (side * reduced for side in image_3HW.shape[1:])
    rows, columns = best_grid(width, height, spec)
    new_width, new_height = fitted_size(width, height, columns * size, rows * size)
    top, left = (rows * size - new_height) // 2, (columns * size - new_width) // 2
    canvas = torch.zeros(3, rows * size, columns * size, dtype=torch.uint8)
    canvas[:, top : top + new_height, left : left + new_width] = _scale(image_3HW, new_height, new_width)
    tiles = canvas.reshape(3, rows, size, columns, size).permute(1, 3, 0, 2, 4).reshape(-1, 3, size, size)
    return torch.cat([_scale(image_3HW, size, size)[None], tiles])


def _scale(image_3HW: "Tensor", height: int, width: int) -> "Tensor":
    import torch
    from torch.nn.functional import interpolate

    if image_3HW.shape[1:] == (height, width):
        return image_3HW.clone(memory_format=torch.contiguous_format)
    # Of pixels that lie one after another, torch takes no copy, and it resizes them in this thread. Its own copy of a
    # part of a picture takes longer than resizing that, in all threads.
    whole = torch.from_numpy(np.ascontiguousarray(image_3HW.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    scaled = interpolate(whole[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].contiguous()


_OPENERS = {"jpg": JpegImageFile, "png": PngImageFile, "webp": WebPImageFile}


class TooManyPixels(Exception):
    """The header states more pixels than are ever decoded."""


def open_image(data: bytes) -> ImageFile:
    """Read an image's header, of any size; nothing is decoded.

    The plugins are called directly: `Image.open` raises before the size of a large image can be read, and it tries
    every format that Pillow supports.

    Raises:
        ValueError: neither JPEG nor PNG nor WebP.
        Exception: whatever Pillow raises on a broken header.
    """
    kind = image_kind(data)
    if kind is None:
        raise ValueError("neither JPEG nor PNG nor WebP")
    return _OPENERS[kind](io.BytesIO(data))


def size_in(data: bytes) -> tuple[int, int]:
    """Width and height of an image as `rgb_pixels` returns it, from its header.

    Raises:
        ValueError: neither JPEG nor PNG nor WebP.
        Exception: whatever Pillow raises on a broken header.
    """
    image = open_image(data)
    width, height = image.size
    if not _may_turn(data, image):
        return width, height
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return (height, width) if orientation in TURNED else (width, height)


def _may_turn(data: bytes, image: ImageFile) -> bool:
    """Whether an image may state another orientation: that of a PNG may follow its pixels, which are then decoded."""
    if isinstance(image, PngImageFile):
        return any(mark in data for mark in _PNG_MARKS) and image.width * image.height <= PIXEL_CAP
    return "exif" in image.info or "xmp" in image.info


_PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")


def check_size(width: int, height: int) -> None:
    """Raise TooManyPixels for an image that is never decoded."""
    if width * height > PIXEL_CAP or max(width, height) > SIDE_CAP:
        raise TooManyPixels(f"{width} x {height} pixels are more than the cap of {PIXEL_CAP / 1e6:.0f} million")


def rgb_pixels(data: bytes, spec: ImageSpec | None = None, *, passing: bool = False) -> tuple[np.ndarray, int]:
    """Decode an image to RGB: its first frame, rotated as its EXIF data state, on a white background.

    Args:
        data: the file's bytes.
        spec: what it is decoded for; with `reduce_jpegs` a JPEG may be decoded smaller, see `reduction`.
        passing: see `jpeg_pixels`.

    Returns:
        uint8 `[H, W, 3]`, contiguous, and the factor by which both sides were reduced.

    Raises:
        TooManyPixels: the header states more than `PIXEL_CAP` pixels or a side longer than `SIDE_CAP`.
        Exception: whatever Pillow raises on broken bytes.
    """
    image = _open_checked(data)
    if isinstance(image, JpegImageFile) and (decoded := jpeg_pixels(data, image, spec, passing=passing)) is not None:
        return decoded
    return np.array(_rgb(image)), 1


def load_rgb(data: bytes) -> Image.Image:
    """Decode an image as `rgb_pixels` does, for drawing with Pillow."""
    return Image.fromarray(rgb_pixels(data)[0])


def _open_checked(data: bytes) -> ImageFile:
    try:
        image = open_image(data)
    except Image.DecompressionBombError as error:  # the WebP plugin has a check of its own
        raise TooManyPixels(str(error)) from None
    check_size(*image.size)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):  # 16-bit gray, which convert() would clip to white
        gray = np.asarray(image).astype(np.int64).clip(0, 65_535) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
