"""Pictures in a page of HTML: small WebP files as data URLs, within a budget."""

import base64
import io
from pathlib import Path

from PIL import Image

from mmlab.report.run_facts import RunFacts, thinned

WIDEST = 1200  # pixels; the texts on a sheet stay legible
_TALLEST = 16_383  # pixels of a WebP file
_QUALITY = 72
_BUDGET = 7_000_000  # bytes of all sheets of a page
_SHEETS, _FEWEST = 24, 4  # sheets of all runs together, and of each

Film = dict[int, str]
"""Step → the data URL of a sheet."""


def thumbnail(path: Path) -> str:
    """The data URL of a picture, not wider than `WIDEST` or higher than `_TALLEST`; empty if it cannot be read."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((WIDEST, _TALLEST), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def films(runs: list[RunFacts]) -> tuple[list[Film], str]:
    """The sheets of validation samples of some runs, and a sentence about those that are left out."""
    sheets = [run.sheets for run in runs]
    count, total = max(_FEWEST, _SHEETS // max(1, len(runs))), sum(map(len, sheets))
    encoded: dict[Path, str] = {}
    while True:
        kept = [thinned(each, count) for each in sheets]
        for path in (path for each in kept for path in each.values()):
            encoded.setdefault(path, thumbnail(path))
        found = [{step: url for step, path in each.items() if (url := encoded[path])} for each in kept]
        if count == 2 or sum(len(url) for each in found for url in each.values()) <= _BUDGET:
            break
        count = max(2, count // 2)
    shown = sum(map(len, found))
    return found, f"{shown} of {total} sheets are shown, spread over the steps." if shown < total else ""
