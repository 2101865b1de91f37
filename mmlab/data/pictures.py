"""Opening foreign picture files with Pillow: three formats, header first, and always RGB in the end."""

import io

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mmlab.data.formats import PIXEL_CAP, SIDE_CAP, picture_kind

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
