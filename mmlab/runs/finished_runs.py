"""Which runs in a folder are complete, and which recipe each of them is of."""

import re
import sys
from functools import cache
from pathlib import Path

from mmlab.runs.ranks import rank

DONE = "done.json"
FAILED = "failed.json"
OVERRIDES = "overrides.txt"


def finished(folder: Path) -> bool:
    """Whether the run in this folder is complete."""
    return (folder / DONE).is_file()


def recipe_of(folder: Path) -> str | None:
    """Return the recipe (`experiment=`) of the run in a folder, None if it has none."""
    try:
        lines = (folder / OVERRIDES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next(
        (line.partition("=")[2] for line in reversed(lines) if line.lstrip("+").startswith("experiment=")), None
    )


def only_run_of(recipe: str, root: Path) -> Path | None:
    """Return the complete run of a recipe, whatever its name; None if there is none, or more than one.

    The run is printed, because the name alone did not say which one it is. A folder that `run.fresh` renamed is not
    counted.
    """
    runs = [run for run in (file.parent for file in sorted(root.glob(f"*/{DONE}"))) if not _renamed(run)]
    fitting = [run for run in runs if recipe_of(run) == recipe]
    if len(fitting) != 1:
        return None
    _say(f"{recipe} is the run {fitting[0].name}: no run has that name, and it is the only complete one of the recipe.")
    return fitting[0]


@cache
def _say(text: str) -> None:
    """Print a sentence once, on the first rank."""
    if rank() == 0:
        print(text, file=sys.stderr, flush=True)


def _renamed(run: Path) -> bool:
    earlier = re.fullmatch(r"(.+)\.\d+", run.name)
    return earlier is not None and run.with_name(earlier[1]).exists()
