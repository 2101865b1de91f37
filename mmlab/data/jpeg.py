"""JPEG files, decoded by libjpeg-turbo itself (simplejpeg): faster than through Pillow, and to the same pixels.

Legend: H/W pixels.
"""

import math
import threading

import numpy as np
from PIL import ExifTags
from PIL.JpegImagePlugin import JpegImageFile

from mmlab.data.anyres import best_grid, fitted_size
from mmlab.data.aspects import bucket_of, covering
from mmlab.data.config import ANYRES
from mmlab.data.sample_types import ImageSpec

REDUCTIONS = (8, 4, 2)
"""By how much libjpeg-turbo's vectorized inverse DCTs can reduce both sides."""
SPARE = 2
"""A reduced picture has at least this many times the pixels, per side, that resizing makes of it."""
LARGEST_KEPT = 2**26
"""Bytes of pixels for which a thread keeps its memory, about 22 megapixels."""


class _Memory(threading.local):
    """A thread's memory for the pixels of one picture. Zeroed pages of the system cost a tenth of decoding."""

    def __init__(self) -> None:
        self.bytes = np.empty(0, np.uint8)

    def of(self, shape: tuple[int, ...]) -> np.ndarray:
        size = math.prod(shape)
        if size > LARGEST_KEPT:
            return np.empty(shape, np.uint8)
        if size > len(self.bytes):
            self.bytes = np.empty(size, np.uint8)
        return self.bytes[:size].reshape(shape)


_memory = _Memory()


def jpeg_pixels(
    data: bytes, image: JpegImageFile, spec: ImageSpec | None = None, *, passing: bool = False
) -> tuple[np.ndarray, int] | None:
    """Decode a JPEG file, turned as its EXIF data state.

    Args:
        data: the file's bytes.
        image: its header, of which the size was checked.
        spec: what the picture is decoded for; with `reduce_jpegs` it may be decoded smaller.
        passing: the pixels are used before this thread decodes another picture into the same memory.

    Returns:
        uint8 `[H, W, 3]`, RGB, contiguous, and the factor by which both sides were reduced; None for a file that Pillow
        has to decode: CMYK, or one that libjpeg-turbo warns of, which Pillow accepts or refuses with its own reason.
    """
    from simplejpeg import decode_jpeg

    if image.mode not in ("L", "RGB"):
        return None
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation in TURNED
    width, height = image.size
    by = reduction(*((height, width) if turned else (width, height)), spec) if spec else 1
    # Memory is what the checked header states, also where the decoder reads another size.
    shape = (height // by, width // by, 3)
    pixels = _memory.of(shape) if passing else np.empty(shape, np.uint8)
    least = (0, 0) if by == 1 else pixels.shape[:2]
    try:
        decoded = decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1], buffer=pixels)
    except ValueError:
        return None
    if decoded.shape != pixels.shape:
        return None
    return _turned(pixels, orientation), by


def reduction(width: int, height: int, spec: ImageSpec) -> int:
    """By how much a picture of that size can be decoded smaller: 8, 4, 2, or 1 for not at all.

    `SPARE` times the pixels that resizing makes are kept. Each pixel of the smaller picture covers a square of whole
    pixels, and a crop begins at the border of one; positions are then exactly those of the picture's own size.
    """
    if not spec.reduce_jpegs:
        return 1
    size, whole = spec.size, [width, height]
    if spec.buckets:
        shape = spec.buckets[bucket_of(width, height, spec.buckets)]
        crop = covering(width, height, shape)
        share = max(shape[1] / crop[2], shape[0] / crop[3])
        whole += crop
    elif spec.aspect == "crop":
        share = size / min(width, height)
        whole.append(abs(height - width) // 2)
    elif spec.aspect == "pad":
        share = size / max(width, height)
    else:
        share = size / min(width, height)  # of a stretched picture, the side that keeps the most
    if spec.aspect == ANYRES:
        rows, columns = best_grid(width, height, spec)
        share = max(share, fitted_size(width, height, columns * size, rows * size)[0] / width)
    fits = (by for by in REDUCTIONS if by * share * SPARE <= 1 and not any(number % by for number in whole))
    return next(fits, 1)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels turned and mirrored by an orientation of EXIF, as `PIL.ImageOps.exif_transpose` does."""
    if orientation not in range(2, 9):
        return pixels
    view = pixels.view("V3")[..., 0]  # whole pixels, which numpy copies faster than single bytes
    if orientation in TURNED:
        view = view.T
    rows, columns = _REVERSED[orientation]
    view = view[:: -1 if rows else 1, :: -1 if columns else 1]
    return view.copy()[..., None].view(np.uint8)


TURNED = (5, 6, 7, 8)
"""Orientations of EXIF that swap width and height."""
_REVERSED = {
    2: (False, True),
    3: (True, True),
    4: (True, False),
    5: (False, False),
    6: (False, True),
    7: (True, True),
    8: (True, False),
}  # orientation → whether the order of rows and columns is reversed, after the swap
