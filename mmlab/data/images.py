"""From the bytes of a picture file to the uint8 tensor that a model takes. Legend: H/W pixels, S the side."""

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torch.nn.functional import interpolate

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.formats import PIXEL_CAP, SIDE_CAP, picture_kind
from mmlab.data.sample import ImageSpec, SampleError

PAD_COLOUR = (122, 116, 104)
"""CLIP's mean colour, with which LLaVA pads a picture to a square."""
ASPECTS = ("pad", "crop", "stretch")


def decode_image(data: bytes, spec: ImageSpec) -> Tensor:
    """Decode a JPEG, PNG or WebP and bring it to the model's size.

    Args:
        data: the file's bytes; its name is not asked.
        spec: side of the square and what to do with the aspect.

    Returns:
        uint8 `[3, S, S]`, RGB, contiguous.

    Raises:
        SampleError: `pixels` for a header beyond the cap (nothing is decoded), `decode` for anything
            unreadable.
        ConfigError: `spec.aspect` is unknown.
    """
    try:
        picture = load_rgb(data)
    except TooManyPixels as error:
        raise SampleError("pixels", str(error)) from None
    except Exception as error:  # Pillow's parsers raise nearly anything on broken bytes
        raise SampleError(
            "decode", f"unreadable picture ({len(data)} bytes): {error or type(error).__name__}"
        ) from None
    return resize(torch.from_numpy(np.array(picture)).permute(2, 0, 1), spec)


def resize(image_3HW: Tensor, spec: ImageSpec) -> Tensor:
    """Bring a picture to a square by `spec`, bicubic with antialiasing, in uint8 throughout.

    Padding resizes first and pads then, cropping crops first and resizes then: the work is bounded by the
    picture's own pixels, however long and thin it is.

    Args:
        image_3HW: uint8 `[3, H, W]` of any strides.
        spec: side of the square and what to do with the aspect.

    Returns:
        uint8 `[3, S, S]`, contiguous.
    """
    height, width = image_3HW.shape[1:]
    size = spec.size
    if spec.aspect == "stretch":
        return _scale(image_3HW, size, size)
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _scale(image_3HW[:, top : top + side, left : left + side], size, size)
    if spec.aspect != "pad":
        hint = nearest(spec.aspect, ASPECTS)
        raise ConfigError(f"unknown aspect '{spec.aspect}'; it is one of {', '.join(ASPECTS)}.{hint}")
    longest = max(height, width)
    inner = _scale(image_3HW, max(1, round(height * size / longest)), max(1, round(width * size / longest)))
    if inner.shape[1:] == (size, size):
        return inner
    square = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    top, left = (size - inner.shape[1]) // 2, (size - inner.shape[2]) // 2
    square[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return square


def _scale(image_3HW: Tensor, height: int, width: int) -> Tensor:
    if image_3HW.shape[1:] == (height, width):
        return image_3HW.contiguous()
    scaled = interpolate(image_3HW[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled[0].contiguous()


_OPENERS = {"jpg": JpegImageFile, "png": PngImageFile, "webp": WebPImageFile}


class TooManyPixels(Exception):
    """The header claims more pixels than are ever decoded."""


def open_picture(data: bytes) -> ImageFile:
    """Read a picture's header, whatever its file is called; nothing is decoded and no size is refused.

    The plugins are called by name: `Image.open` raises before one can read the size that it finds too large,
    and it would try every format that Pillow knows.

    Raises:
        ValueError: neither JPEG nor PNG nor WebP.
        Exception: whatever Pillow raises on a broken header.
    """
    kind = picture_kind(data)
    if kind is None:
        raise ValueError("neither JPEG nor PNG nor WebP")
    return _OPENERS[kind](io.BytesIO(data))


def load_rgb(data: bytes) -> Image.Image:
    """Decode a picture to RGB: first frame, turned as its EXIF data say, transparency laid on white.

    Raises:
        TooManyPixels: the header claims more than `PIXEL_CAP` pixels or a side beyond `SIDE_CAP`.
        Exception: whatever Pillow raises on broken bytes.
    """
    try:
        picture: Image.Image = open_picture(data)
    except Image.DecompressionBombError as error:  # the WebP plugin has a check of its own
        raise TooManyPixels(str(error)) from None
    width, height = picture.size
    if width * height > PIXEL_CAP or max(width, height) > SIDE_CAP:
        raise TooManyPixels(f"{width} x {height} pixels are more than the cap of {PIXEL_CAP / 1e6:.0f} million")
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):  # 16-bit grey, which convert() would clip to white
        return Image.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65_535) >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")
