"""wandb's offline files: the segment of one start of a run, and the history of several."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages

from mmlab.training.wandb_files import find_segments, write_records


def message(**fields: Any) -> Any:
    return messages.Record(**fields)  # pyright: ignore[reportAttributeAccessIssue]


def write_segment(
    run: Path, started: int, rows: Mapping[int, Mapping[str, Any]], ended: bool = True, online: bool = False
) -> Path:
    """Write a segment of run `r-1` with these rows; return its file."""
    records = [message(num=1), message(num=2)]
    records[0].header.version_info.producer = "test"
    records[1].run.run_id = "r-1"
    records[1].run.project = "p"
    records[1].run.start_time.seconds = started
    records[1].run.config.update.add(key="optim", value_json='{"lr": 0.1}')
    records[1].run.config.update.add(key="_wandb", value_json="{}")
    for step, row in rows.items():
        record = message(num=len(records) + 1)
        record.history.step.num = step
        for name, value in {"_step": step, **row}.items():
            record.history.item.add(nested_key=name.split("|"), value_json=json.dumps(value))
        records.append(record)
    if ended:
        records.append(message(num=len(records) + 1))
        records[-1].exit.exit_code = 0
    folder = run / "wandb" / f"{'' if online else 'offline-'}run-{started}-r-1"
    folder.mkdir(parents=True)
    file = folder / "run-r-1.wandb"
    file.write_bytes(write_records([record.SerializeToString() for record in records]))
    return file


def history(run: Path) -> dict[int, dict[str, Any]]:
    """Step → logged values; each segment replaces those of earlier ones from its first step on."""
    rows: dict[int, dict[str, Any]] = {}
    for segment in find_segments(run):
        first = min(segment.rows, default=None)
        rows = {step: row for step, row in rows.items() if first is None or step < first} | segment.rows
    return rows
