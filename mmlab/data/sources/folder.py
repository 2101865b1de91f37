"""The picture folder of a foreign data set: paths stay inside it, losses are counted and limited."""

from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.formats import picture_kind


class PictureFolder:
    """Reads the pictures that a data set names.

    Attributes:
        missing: pictures that were not there.
        unsupported: pictures that are neither JPEG nor PNG nor WebP, whatever they are called.
    """

    def __init__(self, root: str | Path, missing_budget: float, total: int):
        """
        Args:
            root: the folder.
            missing_budget: share of the `total` pictures that may be missing or unsupported.
            total: how many will be asked for.

        Raises:
            DataError: there is no such folder.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"there is no picture folder {self.root}.")
        self.missing = self.unsupported = 0
        self._allowed = int(missing_budget * total)

    def read(self, name: Any, where: str) -> tuple[str, bytes] | None:
        """Return extension and bytes of a picture, or None (counted) if it cannot be had.

        Raises:
            DataError: naming `where`, for a path that leaves the folder, or losses beyond the budget.
        """
        if not isinstance(name, str):
            raise DataError(f"{where}: a picture is named by one path, not {type(name).__name__}.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{where}: picture '{name}' points outside {self.root}.")
        try:
            data = (self.root / name).read_bytes()
        except (OSError, ValueError):
            self.missing += 1
            return self._lose(f"{where}: picture '{name}' is not in {self.root}")
        kind = picture_kind(data)
        if kind is None:
            self.unsupported += 1
            return self._lose(f"{where}: picture '{name}' is neither JPEG nor PNG nor WebP")
        return kind, data

    def _lose(self, why: str) -> None:
        lost = self.missing + self.unsupported
        if lost > self._allowed:
            raise DataError(f"{why}; {lost} are lost and the missing budget allows {self._allowed}.")
