"""Print the figures of one run of run.sh as one JSON object: figures.py EVAL_FOLDER SECONDS."""

import json
import sys
from pathlib import Path


def accuracy(scores: dict, types: tuple[str, ...]) -> float:
    """Accuracy over some question types."""
    rows = [row for name, row in scores["types"].items() if name in types]
    return sum(row["accuracy"] * row["questions"] for row in rows) / sum(row["questions"] for row in rows)


folder, seconds = Path(sys.argv[1]), int(sys.argv[2])
finetune, align, no_align = (
    json.loads((folder / name / "scores.json").read_text()) for name in ("finetune", "align", "no_align")
)
open_types = ("color", "shape")
figures = {
    "test_accuracy": finetune["accuracy"],
    "open_accuracy": accuracy(finetune, open_types),
    "yesno_accuracy": accuracy(finetune, ("yesno",)),
    "align_only_open_accuracy": accuracy(align, open_types),
    "no_align_accuracy": no_align["accuracy"],
    "blind_accuracy": finetune["question_only"]["accuracy"],
    "minutes": seconds / 60,
}
print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
