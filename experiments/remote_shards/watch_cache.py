"""Watches the bytes of a shard cache, in a process of its own: watch_cache.py FOLDER CSV.

Every few milliseconds it adds up the files of the cache, those of unfinished downloads included: their lengths, and the
blocks that the disk has allocated for them. It ends with its standard input, writes the largest values of each tenth of
a second to CSV (seconds, length, allocated, downloads under way, files), and prints a summary as JSON.
"""

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

OWN = {"socket", "lock", "fetcher.log"}
"""The fetcher's own files, which are not part of the cache."""
PAUSE = 0.003
BIN = 0.1


@dataclass
class Look:
    """What is in the cache at a moment; files with two names, as in a rename, count once."""

    length: int = 0
    allocated: int = 0
    parts: int = 0
    files: int = 0


def look(folder: Path) -> Look:
    """Add up the files of a cache."""
    seen, total = set(), Look()
    folders = [folder]
    for place in folders:
        try:
            entries = list(os.scandir(place))
        except OSError:  # not created yet
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                status = os.stat(entry.path)
            except OSError:  # renamed or evicted
                continue
            if (place == folder and entry.name in OWN) or status.st_ino in seen:
                continue
            seen.add(status.st_ino)
            total.length += status.st_size
            total.allocated += status.st_blocks * 512
            total.parts += entry.name.endswith(".part")
            total.files += 1
    return total


def main(folder: Path, table: Path) -> None:
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    most, rows, looks, began = Look(), {}, 0, time.monotonic()
    while not ended.wait(PAUSE):
        now = asdict(look(folder))
        looks += 1
        row = rows.setdefault(int((time.monotonic() - began) / BIN), Look())
        for target in (most, row):
            for name, value in now.items():
                setattr(target, name, max(getattr(target, name), value))
    lines = [f"{at * BIN:.1f},{row.length},{row.allocated},{row.parts},{row.files}" for at, row in rows.items()]
    table.write_text("\n".join(["seconds,length,allocated,parts,files", *lines]) + "\n")
    seconds = time.monotonic() - began
    summary = {"looks": looks, "looks_per_second": round(looks / seconds, 1), "seconds": round(seconds, 1)}
    print(json.dumps(summary | {f"most_{name}": value for name, value in asdict(most).items()}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
