"""Print the figures of one run of run.sh as one JSON object: figures.py OUT SECONDS."""

import json
import sys
from pathlib import Path

from reviewer import right, whole

out, seconds = Path(sys.argv[1]), int(sys.argv[2])


def described(name: str) -> tuple[dict, float]:
    """Incoherence scores of a run's descriptions, and their accuracy on images with a complete caption."""
    rows = [json.loads(line) for line in (out / "eval" / name / "descriptions.jsonl").read_text().splitlines()]
    known = [right(row["description"], row["caption"]) for row in rows if whole(row["caption"])]
    return json.loads((out / "eval" / name / "scores.json").read_text()), sum(known) / len(known)


(before, right_before), (after, right_after) = described("stage1"), described("stage2")
curation = json.loads((out / "curated" / "report.json").read_text())
figures = {
    "incoherent_before": before["incoherent"],
    "incoherent_after": after["incoherent"],
    **{f"{fault}_before": before[fault] for fault in ("repeated", "fragment", "no_end")},
    **{f"{fault}_after": after[fault] for fault in ("repeated", "fragment", "no_end")},
    "caption_correct": right_after,
    "caption_correct_before": right_before,
    "described": curation["described"]["samples"],
    "repaired": curation["repaired"]["changed"],
    "filtered": curation["filtered"]["caught"],
    "edited": curation["reviewed"]["edited"],
    "rejected": curation["reviewed"]["rejected"],
    "kept": curation["written"]["samples"],
    "minutes": seconds / 60,
}
print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
