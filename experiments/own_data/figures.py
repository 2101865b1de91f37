"""Print the figures of one run of run.sh as one JSON object: figures.py EVAL_FOLDER SECONDS."""

import json
import sys
from pathlib import Path

folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
scores = json.loads((folder / "scores.json").read_text())


def rows(table: dict) -> dict:
    """The rows of questions; captions can be right in many ways."""
    return {name: row for name, row in table["types"].items() if name != "caption"}


def accuracy(table: dict) -> float:
    """Over all questions."""
    chosen = rows(table).values()
    return sum(row["accuracy"] * row["questions"] for row in chosen) / sum(row["questions"] for row in chosen)


blind, constant = scores["blind"], scores["constant"]
types = {
    name: {
        "accuracy": round(row["accuracy"], 4),
        "blind": round(rows(blind)[name]["accuracy"], 4),
        "constant": round(rows(constant)[name]["accuracy"], 4),
    }
    for name, row in rows(scores).items()
}
figures = {
    "accuracy": round(accuracy(scores), 4),
    "blind": round(accuracy(blind), 4),
    "least_gain": round(min(row["accuracy"] - max(row["blind"], row["constant"]) for row in types.values()), 4),
    "types": types,
    "minutes": round(seconds / 60, 1),
}
print(json.dumps(figures))
