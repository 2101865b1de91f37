"""Files that a person names: they are there, and hold JSON."""

import json
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest


def existing(path: Path) -> Path:
    """The path of a file; DataError with the nearest name beside it where there is none."""
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"there is no file {path}.{nearest(path.name, siblings)}")
    return path


def load_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(existing(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None
