"""Images of foreign data sets: which files of a folder are read, and in which form shards store them."""

import io
import os
from base64 import b64decode
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import unquote

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageOps import exif_transpose
from PIL.TiffImagePlugin import TiffImageFile

from mmlab.config.errors import DataError, existing_folder
from mmlab.data.formats import MOST_PICTURES, image_kind
from mmlab.data.images import check_size, decoding, rgb_pixels
from mmlab.data.sample_types import SampleError
from mmlab.data.tally import Tally

READ_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff")
_UNREAD = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".ico", ".svg", ".psd", ".tga", ".exr", ".hdr", ".apng"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pcx", ".raw", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".eps"),
)
PICTURE_SUFFIXES = frozenset(READ_SUFFIXES + _UNREAD)
"""Endings of the names of images, whether they are read or not."""

_CONVERTED = (
    (b"BM", BmpImageFile),
    *((mark, GifImageFile) for mark in (b"GIF87a", b"GIF89a")),
    *((mark, TiffImageFile) for mark in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
)
_LOSSLESS = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pixels that a PNG holds unchanged."""


LOST = ("missing", "outside", "remote")
"""Reasons, beside `unsupported`, for which an image counts as lost."""


class Picture(NamedTuple):
    """An image of a data set: its path in the folder, and what a shard stores."""

    name: str
    extension: str
    data: bytes


class ImageFolder:
    """Reads the images that a data set names."""

    def __init__(self, root: str | Path | None):
        """
        Args:
            root: the folder; None for images that the data set holds itself.

        Raises:
            DataError: there is no such folder.
        """
        self.root = None if root is None else existing_folder(root)

    def read(self, name: Any, where: str, tally: Tally) -> Picture:
        """Read an image, and check that training can decode it.

        Args:
            name: its path from the folder, or an absolute one in it, also as a `file:` URL; a `data:` URL;
                `{"bytes", "path"}` of `datasets`; a list of one of these; or an id, the name of a file without its
                ending.
            where: of the row that names it, for errors.
            tally: counts images that are `converted`, and those that are lost: missing, outside the folder or in a
                format that is not read.

        Raises:
            SampleError: `no-image` (not a path), `pictures` (several), `missing`, `outside`, `remote`, `unsupported`,
                `pixels` or `decode`.
        """
        if isinstance(name, list) and len(name) > 1:
            raise SampleError("pictures", f"It names {len(name)} images, of which only chats can have several.")
        name = name[0] if isinstance(name, list) and name else name
        name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
        if isinstance(name, dict) and isinstance(name.get("bytes"), bytes):
            path = as_text(str(name.get("path") or "image"))
            return Picture(path, *stored(name["bytes"], path, tally))
        if not isinstance(name, str) or not name.strip():
            raise SampleError("no-image", f"An image is named by one path, not {name!r}.")
        try:
            if name.startswith("data:"):
                return Picture("data", *stored(_inline(name), "data:", tally))
            inside = self._inside(_local(name))
            extension, data = stored(self._bytes(inside), inside, tally)
        except SampleError as error:
            if error.reason in LOST or error.reason.startswith("unsupported"):
                tally.lost.append(f"{where}: {error}")
            raise
        return Picture(as_text(inside), extension, data)

    def read_all(self, names: Sequence[Any], where: str, tally: Tally) -> list[Picture]:
        """Read the images of a sample, each as `read` does.

        Raises:
            SampleError: as `read`; `pictures` for more than a sample holds.
        """
        if len(names) > MOST_PICTURES:
            raise SampleError("pictures", f"It has {len(names)} images; a sample holds at most {MOST_PICTURES}.")
        return [self.read(name, where, tally) for name in names]

    def _inside(self, name: str) -> str:
        """The path from the folder; a relative one that stays in it is returned as it is."""
        if self.root is None:
            raise SampleError("missing", f"image '{name}' is not among the data")
        root = os.path.abspath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        try:
            real = os.path.realpath(path)
        except ValueError:  # a NUL or half a character
            raise SampleError("missing", f"image '{name}' is not in {self.root}") from None
        for base, one in ((root, path), (os.path.realpath(root), real)):
            if one.startswith(base.rstrip(os.sep) + os.sep):
                return os.path.relpath(one, base) if os.path.isabs(name) else name
        raise SampleError("outside", f"image '{name}' points outside {self.root}")

    def _bytes(self, name: str) -> bytes:
        path = Path(self.root or "", name)
        try:
            if not path.is_file() and path.suffix.lower() not in PICTURE_SUFFIXES:
                named = (path.with_name(path.name + suffix) for suffix in READ_SUFFIXES)
                path = next((one for one in named if one.is_file()), path)
            if path.is_file():
                return path.read_bytes()
        except OSError as error:
            raise SampleError("missing", f"image '{name}' cannot be read: {error.strerror}") from None
        raise SampleError("missing", f"image '{name}' is not in {self.root}")


def _local(name: str) -> str:
    """The path of an image that may be named by a URL; raises SampleError `remote` for one on the network."""
    scheme, colon, rest = name.partition("://")
    if colon and scheme.lower() == "file":
        return unquote(rest)
    if colon and scheme.lower() in ("http", "https", "s3", "gs", "hf"):
        raise SampleError("remote", f"image '{name[:200]}' is on the network; download it and name its file")
    return name


def _inline(url: str) -> bytes:
    """The bytes of a `data:` URL."""
    about, _, text = url.partition(",")
    if not about.endswith(";base64"):
        raise SampleError("no-image", f"A data: URL of an image has base64, not {about[:60]!r}.")
    try:
        return b64decode(unquote(text))
    except ValueError as error:
        raise SampleError("decode", f"The base64 of an image is broken: {error}.") from None


def stored(data: bytes, name: str, tally: Tally) -> tuple[str, bytes]:
    """Extension and bytes with which a shard stores an image.

    JPEG, PNG and WebP files are stored as they are. The first frame of a BMP, GIF or TIFF becomes a PNG with the same
    pixels, upright as its EXIF data state.

    Raises:
        SampleError: `unsupported` for another format, or pixels that a PNG does not hold; `pixels` or `decode` if
            training could not decode it.
    """
    kind = image_kind(data)
    if kind is not None:
        with decoding(data):
            rgb_pixels(data)
        return kind, data
    opener = next((opener for mark, opener in _CONVERTED if data.startswith(mark)), None)
    if opener is None:
        suffix = PurePath(name).suffix.lower()
        what = f"unsupported {suffix}" if suffix in _UNREAD else "unsupported"
        raise SampleError(what, f"image '{name}' is neither JPEG, PNG, WebP, BMP, GIF nor TIFF")
    with decoding(data):
        image = opener(io.BytesIO(data))
        check_size(*image.size)
        image.load()
        frames = getattr(image, "n_frames", 1)
        exif_transpose(image, in_place=True)
        mode = "I;16" if image.mode.startswith("I;16") else image.mode
        if mode not in _LOSSLESS:
            raise SampleError("unsupported", f"image '{name}' has {image.mode} pixels, which no PNG holds unchanged")
        file = io.BytesIO()
        (image if mode == image.mode else image.convert(mode)).save(file, "PNG")
        rgb_pixels(file.getvalue())
    tally.details["converted"] += 1
    if frames > 1:
        tally.details["first_of_several_frames"] += 1
    return "png", file.getvalue()


def files_of(root: Path) -> list[Path]:
    """All files below a folder in the order of their paths; links to folders are followed, each folder once.

    Raises:
        DataError: a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"the folder {error.filename} cannot be read: {error.strerror}.")

    files, seen = [], {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders)}
        folders[:] = [name for name, path in real.items() if path not in seen]
        seen.update(real.values())
        files += [Path(folder, name) for name in names]
    return sorted(files)


def pictures_of(root: Path, tally: Tally, texts: dict[Path, Path] | None = None) -> Iterator[Path]:
    """The images below a folder by their names; every other file is left out under a name.

    Args:
        root: the folder.
        tally: counts `hidden` files, images in formats that are not read, and files that are no images.
        texts: is filled with the `.txt` of each image without its suffix; these files are not left out.
    """
    files = files_of(existing_folder(root))
    images = {path.with_suffix("") for path in files if path.suffix.lower() in READ_SUFFIXES}
    for path in files:
        suffix, where = path.suffix.lower(), as_text(str(path))
        if any(part.startswith(".") for part in path.relative_to(root).parts):
            tally.leave_out("hidden", f"{where}: Its name begins with a dot.")
        elif suffix in READ_SUFFIXES:
            yield path
        elif suffix in _UNREAD:
            tally.leave_out(f"unsupported {suffix}", f"{where}: Convert it to JPEG or PNG.")
        elif suffix != ".txt" or texts is None:
            tally.leave_out("no image", f"{where}: Its name is not an image's.")
        elif path.with_suffix("") in images:
            texts.setdefault(path.with_suffix(""), path)
        else:
            tally.leave_out("text without image", f"{where}: There is no image of the same name.")


def as_text(name: str) -> str:
    """A file's name as text; bytes of it that are not UTF-8 become question marks."""
    return name.encode("utf-8", "replace").decode()
