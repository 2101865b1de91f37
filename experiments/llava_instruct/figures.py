"""Print the figures of one run of run.sh as one JSON object: figures.py OUT SECONDS KILLS."""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

from endpoint import question_of

out, seconds, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
SETS = ("train", "val", "told")


def adds_up(report: dict) -> bool:
    """Whether the input of each step equals its output plus what it dropped, per type and in total."""
    written = report["written"]
    return all(
        row["chosen"] == row["answered"] + sum(row["unanswered"].values())
        and row["answered"] == row["parsed"] + sum(row["malformed"].values())
        and row["parsed"] == row["kept"] + row["caught"]
        for row in (*report["types"].values(), report["total"])
    ) and (report["total"]["kept"] == written["entries"] == written["samples"] + written["without_picture"])


def rows(name: str, step: str) -> list[dict]:
    return [json.loads(line) for line in (out / name / f"{step}.jsonl").read_text().splitlines()[1:]]


def invented(name: str) -> int:
    """Number of dialogue texts contained in no reply, except the requests for descriptions."""
    said = {row["key"]: row.get("text", "") for row in rows(name, "answered")}
    count = 0
    for row in rows(name, "filtered"):
        texts = [text for turn in row["turns"] for text in turn]
        count += sum(text not in said[row["key"]] for text in texts[row["type"] == "detail_description" :])
    return count


def asked_though_kept(kill: int) -> int:
    """Number of questions sent after a kill although their reply was on disk."""
    kept = set()
    for path in (out / f"kept-{kill}.txt").read_text().split():
        kept.add("\n".join(question_of(json.loads((out / path).read_text())["messages"])))
    later = requests[int((out / f"asked-{kill}.txt").read_text()) :]
    return len(kept & {row["question"] for row in later})


def losses(run: str) -> list[float]:
    with open(out / "runs" / run / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


reports = {name: json.loads((out / name / "report.json").read_text()) for name in SETS}
totals = [report["total"] for report in reports.values()]
requests = [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]
paid = Counter(row["question"] for row in requests if row["paid"])
asked = [row["key"] for name in SETS for row in rows(name, "answered")]
shares = {
    run: json.loads((out / "runs" / run / "data_report.json").read_text())["train"]["types"] for run in ("type", "size")
}
figures = {
    **{
        name: sum(report["data"].get(name, 0) for report in reports.values())
        for name in ("samples", "missing", "without_text", "captions", "boxes", "crowds", "flat")
    },
    **{name: sum(total[name] for total in totals) for name in ("chosen", "answered", "parsed", "caught", "kept")},
    "unanswered": sum((Counter(total["unanswered"]) for total in totals), Counter()),
    "malformed": sum((Counter(total["malformed"]) for total in totals), Counter()),
    "rules": sum((Counter(total["rules"]) for total in totals), Counter()),
    "by_type": {
        kind: sum(report["types"][kind]["kept"] for report in reports.values()) for kind in reports["told"]["types"]
    },
    "samples_in_shards": sum(report["written"]["samples"] for report in reports.values()),
    "adds_up": all(map(adds_up, reports.values())),
    "rows_lost_or_twice": abs(len(asked) - sum(total["chosen"] for total in totals)) + len(asked) - len(set(asked)),
    "texts_invented": sum(map(invented, SETS)),
    "kills": kills,
    "asked_though_kept": sum(asked_though_kept(kill) for kill in range(1, kills + 1)),
    "lost_on_their_way": sum(count > 1 for count in paid.values()),
    "requests": len(requests),
    "acts": Counter(row["act"] for row in requests),
    **{f"shares_{run}": {kind: round(of["share"], 4) for kind, of in found.items()} for run, found in shares.items()},
    **{f"loss_{end}": round(losses("type")[i], 3) for end, i in (("first", 0), ("last", -1))},
    "minutes": round(seconds / 60, 2),
}
print(json.dumps(figures))
