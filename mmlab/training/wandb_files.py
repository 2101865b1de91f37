"""The `.wandb` files of a run, one per start: they are read, and cut where starts overlap.

A file is a log in LevelDB's format (blocks of 32 KiB; a record in one piece or several, each with checksum,
length and kind) behind a header of 7 bytes; its records are wandb's protocol buffers.
"""

import json
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlab.runs.disk import write_text

HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 32768
PIECE = struct.Struct("<IHB")  # checksum of kind and data, length of the data, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class Segment:
    """The history that one start of a run has written.

    Attributes:
        file: the `.wandb` file.
        started: when, in seconds since the epoch.
        id: of the run; all its segments have the same.
        config: as given at the start.
        rows: step → values that were logged, in order.
        ended: whether its end was written, which a killed process does not do.
    """

    file: Path
    started: float
    id: str
    config: dict[str, Any]
    rows: dict[int, dict[str, Any]] = field(repr=False)
    ended: bool

    @property
    def offline(self) -> bool:
        return self.file.parent.name.startswith("offline-")

    @property
    def synced(self) -> bool:
        return not self.offline or self.file.with_suffix(".wandb.synced").exists()


def find_segments(folder: str | Path) -> list[Segment]:
    """Return the segments in a run's folder by start time; a start that was killed at once has none."""
    files = [file for file in Path(folder).glob("wandb/*run-*/run-*.wandb") if not file.parent.is_symlink()]
    segments = [segment for file in files if (segment := read_segment(file)) is not None]
    return sorted(segments, key=lambda segment: segment.started)


def read_segment(file: Path) -> Segment | None:
    """Read one file up to its end, or up to where a killed process stopped writing; None without a run."""
    run, rows, ended = None, {}, False
    for data in read_records(file):
        record = _parse(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = run or record.run
        elif kind == "history":
            rows.setdefault(record.history.step.num, {}).update(_items(record.history.item))
        ended = ended or kind == "exit"
    if run is None:
        return None
    started = run.start_time.seconds + run.start_time.nanos / 1e9
    return Segment(file, started, run.run_id, _items(run.config.update), rows, ended)


def cut_overlaps(folder: str | Path) -> None:
    """Cut segments that are not pushed yet, so that each step is in one segment: wandb would renumber repeated steps.

    A step stays in the latest segment that has it, unless it was pushed already with an earlier one.
    """
    segments = find_segments(folder)
    for n, segment in enumerate(segments):
        if segment.synced or not segment.rows:
            continue
        after = max((max(s.rows) for s in segments[:n] if s.synced and s.rows), default=-1)
        before = min((min(s.rows) for s in segments[n + 1 :] if s.rows), default=None)
        steps = [step for step in segment.rows if step > after and (before is None or step < before)]
        if len(steps) < len(segment.rows):
            keep_steps(segment.file, set(steps))


def keep_steps(file: Path, steps: Collection[int]) -> None:
    """Rewrite a file without the history of other steps; it is replaced atomically."""
    records = []
    for data in read_records(file):
        record = _parse(data)
        if record.WhichOneof("record_type") != "history" or record.history.step.num in steps:
            records.append(data)
    write_text(file, write_records(records))


def read_records(file: Path) -> Iterator[bytes]:
    """Yield the records' bytes up to the first incomplete or broken one."""
    data = file.read_bytes()
    at, record = len(HEADER), b""
    if data[:at] != HEADER:
        return
    while True:
        if BLOCK - at % BLOCK < PIECE.size:
            at += BLOCK - at % BLOCK
        if at + PIECE.size > len(data):
            return
        checksum, length, kind = PIECE.unpack_from(data, at)
        piece = data[at + PIECE.size : at + PIECE.size + length]
        if kind not in (WHOLE, FIRST, MIDDLE, LAST) or checksum != zlib.crc32(piece, zlib.crc32(bytes([kind]))):
            return
        at += PIECE.size + length
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record


def write_records(records: list[bytes]) -> bytes:
    """The contents of a file with these records."""
    out = bytearray(HEADER)
    for record in records:
        begun = False
        while True:
            room = BLOCK - len(out) % BLOCK - PIECE.size
            if room < 0:
                out += bytes(room + PIECE.size)
                continue
            piece, record = record[:room], record[room:]
            kind = (MIDDLE if record else LAST) if begun else (FIRST if record else WHOLE)
            out += PIECE.pack(zlib.crc32(piece, zlib.crc32(bytes([kind]))), len(piece), kind) + piece
            begun = True
            if not record:
                break
    return bytes(out)


def _parse(data: bytes) -> Any:
    from wandb.proto import wandb_internal_pb2 as messages

    record = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]
    record.ParseFromString(data)
    return record


def _items(items: Any) -> dict[str, Any]:
    """Pairs of keys (maybe nested) and values as plain data, without wandb's own."""
    plain: dict[str, Any] = {}
    for item in items:
        path = list(item.nested_key) or [item.key]
        if path[0].startswith("_"):
            continue
        node = plain
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = json.loads(item.value_json)
    return plain
