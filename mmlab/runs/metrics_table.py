"""The table of a run's metrics, as it is read: a row for each logged optimizer step."""

import csv
from collections.abc import Callable
from pathlib import Path

FILE_NAME = "metrics.csv"
STEP = "step"


def read_table(path: str | Path, warn: Callable[[str], None] = lambda fault: None) -> dict[int, dict[str, str]]:
    """Return a table's rows by step, in order, without empty cells; none without a file.

    The incomplete last line of a killed process is left out, and so are lines that are no rows of the table.

    Args:
        path: of the table.
        warn: called with what is wrong if there are such lines.
    """
    path = Path(path)
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    columns = next(csv.reader(lines[:1]), [STEP])
    rows: dict[int, dict[str, str]] = {}
    left_out = 0
    for line in lines[1:]:
        try:
            row = dict(zip(columns, next(csv.reader([line])), strict=True))
            step = int(row.pop(STEP))
            for value in filter(None, row.values()):
                float(value)
        except (ValueError, KeyError, StopIteration, csv.Error):
            left_out += 1
            continue
        rows[step] = {name: value for name, value in row.items() if value}
    if left_out:
        warn(f"{left_out} of {len(lines) - 1} rows cannot be read and are left out")
    return rows
