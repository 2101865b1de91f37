"""Print the figures of one run of run.sh as one JSON object: figures.py."""

import json
from pathlib import Path
from typing import Any

from prepare import best_blind, counts


def read(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


answers, hidden = read("eval/two_pictures-answers/scores.json"), read("hidden.json")
aspects = {name: read(f"eval/{name}/scores.json") for name in ("pad", "anyres")}
figures = {
    "accuracy": answers["types"]["more"]["accuracy"],
    **{f"accuracy_{name}": row["accuracy"] for name, row in hidden.items()},
    "best_from_one_picture": best_blind([counts(n) for n in range(480)], 1),
    "count_accuracy_first": answers["types"]["first"]["accuracy"],
    "count_accuracy_second": answers["types"]["second"]["accuracy"],
    **{f"count_accuracy_{name}": scores["accuracy"] for name, scores in aspects.items()},
    "equal_answers_exported": read("eval/two_pictures-answers/exported.json"),
    "equal_answers_exported_anyres": read("eval/anyres/exported.json"),
}
print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
