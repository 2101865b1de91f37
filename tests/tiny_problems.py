"""A few problems in ScienceQA's layout."""

import json
from pathlib import Path
from typing import Any

from tests.tiny_files import png

PROBLEM: dict[str, Any] = {
    "question": "What is it made of?",
    "choices": ["wood", "glass"],
    "answer": 1,
    "hint": "",
    "image": None,
    "task": "closed choice",
    "grade": "grade3",
    "subject": "natural science",
    "topic": "physics",
    "category": "Materials",
    "skill": "Identify materials",
    "lecture": "Glass is clear.",
    "solution": "One can see through it.",
    "split": "test",
}


def problem(**changes: Any) -> dict[str, Any]:
    return {**PROBLEM, **changes}


def write_problems(root: Path, problems: dict[str, Any], splits: dict[str, Any] | None = None) -> Path:
    """Write the two files, and the images except those named `gone.png`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems))
    if splits is None:
        splits = {}
        for name, one in problems.items():
            splits.setdefault(one["split"], []).append(name)
    (root / "pid_splits.json").write_text(json.dumps(splits))
    for name, one in problems.items():
        if isinstance(one, dict) and one.get("image") and one["image"] != "gone.png":
            folder = root / "images" / one["split"] / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / one["image"]).write_bytes(png())
    return root
