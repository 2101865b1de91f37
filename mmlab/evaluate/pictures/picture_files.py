"""A folder of image files, read like a set of shards with images alone."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from mmlab.config.errors import DataError
from mmlab.data.index import ShardIndex
from mmlab.data.sources.pictures import ImageFolder, as_text, pictures_of
from mmlab.data.tally import Tally

SHEETS = ("grid.png", "strip.png")
"""What `mmlab sample` writes beside its images."""
MEMBER = "jpg"
"""The name of an image among a sample's members, whatever its format is."""


class PictureFiles:
    """The images below a folder in the order of their paths, with the part of `ShardIndex` that scores of images need.

    Args:
        root: the folder.

    Attributes:
        root, keys, hash: the folder, the images' paths in it, and a hash of paths and sizes.
        left_out: what else is in the folder, as text; empty for nothing.

    Raises:
        DataError: no such folder, or no images in it.
    """

    def __init__(self, root: str | Path):
        self._folder, self._tally = ImageFolder(root), Tally()
        self.root = Path(root).expanduser()
        files = [path.relative_to(self.root) for path in pictures_of(self.root, self._tally)]
        sheets = [path for path in files if path.name in SHEETS]
        self._files = [path for path in files if path.name not in SHEETS]
        if not self._files:
            raise DataError(f"{root} has neither shards nor images.")
        counts = {**({"sheets": len(sheets)} if sheets else {}), **self._tally.left_out}
        self.left_out = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        self.keys = np.array([as_text(str(path)) for path in self._files])
        sizes = [(str(path), (self.root / path).stat().st_size) for path in self._files]
        self.hash = blake2b(repr(sizes).encode("utf-8", "replace"), digest_size=32).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def extensions(self, i: int) -> tuple[str, ...]:
        """The members of the i-th image."""
        return (MEMBER,)

    def read(self, i: int, only: Sequence[str]) -> dict[str, bytes]:
        """The i-th image, if `only` has its member; raises SampleError if it cannot be decoded."""
        name = str(self._files[i])
        return {MEMBER: self._folder.read(name, name, self._tally).data} if MEMBER in only else {}


def open_pictures(path: str | Path) -> ShardIndex | PictureFiles:
    """Open a folder of shards, or one of image files; raises DataError if it holds neither."""
    folder = Path(path).expanduser()
    return PictureFiles(path) if folder.is_dir() and not any(folder.glob("*.tar")) else ShardIndex.open(path)
