"""How Python processes are started: without the working folder among the places that modules are imported from.

A run folder or a folder of data may come from somebody else, and a `json.py` in it would run instead of Python's own.
"""

import os
import sys

PYTHON = (sys.executable, "-P")
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""The same as `-P`, inherited by the processes that a child starts itself, such as the ranks of a run."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child."""
    return {**os.environ, **SAFE_PATH, **changes}
