"""Write the emoji tables for `mmlab shards build captions`, OUT/train.jsonl and OUT/val.jsonl: prepare.py DATA OUT.

DATA holds emoji.json and png/64. A row is an image, its class (the category) and its caption (name and keywords).
Near-duplicates stay on one side of the split: skin tones and genders of one base code point, and any other images that
look the same (three places share Norway's flag). A held-out base contributes one image, without skin tones.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from mmlab.data.images import load_rgb

TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINERS = {"200d", "fe0f", "2640", "2642"}  # zero-width joiner, variation selector, female and male signs
HELD_OUT = 0.1  # fraction of groups
ALIKE = 12.0  # RMS difference, on a scale of 255, below which two 32-px images count as the same
CLASSES = {"": "other", "regional": "symbols", "modifier": "symbols"}  # categories of emoji.json to rename


def parts(code: str) -> list[str]:
    """The code points of a sequence without modifiers; `1f44b-1f3fd` (a hand with medium skin tone) → `1f44b`."""
    kept = [part for part in code.split("-") if part not in TONES | JOINERS]
    return kept or code.split("-")


def base(code: str) -> str:
    """The base code point of an emoji; for a flag, which is a sequence of code points, the whole sequence."""
    kept = parts(code)
    spelt = 0x1F1E6 <= int(kept[0], 16) <= 0x1F1FF or any(part.startswith("e00") for part in kept)
    return "-".join(kept) if spelt else kept[0]


def toned(code: str) -> bool:
    """Whether the emoji is a skin-tone variant of another."""
    return "-" in code and any(part in TONES for part in code.split("-"))


def groups(codes: list[str], thumbnails: np.ndarray) -> dict[str, str]:
    """Map each code to the name of its group: codes with one base, or with bases that look alike, share a group.

    Args:
        codes: N sequences of code points.
        thumbnails: [N, 32, 32, 3], their images.
    """
    parent = {base(code): base(code) for code in codes}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    flat = thumbnails.reshape(len(codes), -1).astype(np.float32)
    squares = (flat**2).sum(1)
    for i, code in enumerate(codes):
        distances = squares[i] + squares - 2 * flat @ flat[i]
        for j in np.flatnonzero(distances < ALIKE**2 * flat.shape[1]):
            first, second = sorted((root(base(code)), root(base(codes[j]))))
            parent[second] = first
    return {code: root(base(code)) for code in codes}


def held_out(group: str) -> bool:
    """Whether a group is held out; a random choice keyed by its name only."""
    return int.from_bytes(blake2b(group.encode(), digest_size=8).digest()) / 2**64 < HELD_OUT


def split(codes: list[str], thumbnails: np.ndarray) -> tuple[list[str], list[str]]:
    """(training codes, held-out codes). Only the first image of a held-out base is kept."""
    group = groups(codes, thumbnails)
    train = [code for code in codes if not held_out(group[code])]
    val, seen = [], set()
    for code in codes:
        if held_out(group[code]) and not toned(code) and group[code] not in seen:
            seen.add(group[code])
            val.append(code)
    return train, val


def caption(entry: dict) -> str:
    """Name and up to three keywords that are not part of the name: "red heart, love, valentine"."""
    name = entry["name"].replace("_", " ").lower()
    if entry["category"] == "flags" and "flag" not in name:
        name = f"flag of {name}"
    keywords = [word for word in map(str.lower, entry["keywords"]) if word not in name]
    return ", ".join([name, *keywords[:3]])


def row(code: str, entry: dict) -> dict[str, str]:
    """A line of the table."""
    category = entry["category"]
    return {"image": f"{code}.png", "class": CLASSES.get(category, category), "caption": caption(entry)}


def thumbnail(path: Path) -> np.ndarray:
    """The image on a white background at 32 px, [32, 32, 3]."""
    return np.asarray(load_rgb(path.read_bytes()).resize((32, 32), Image.Resampling.BOX))


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    classes = Counter(row["class"] for row in rows)
    print(f"{path}: {len(rows)} images ({', '.join(f'{name} {n}' for name, n in sorted(classes.items()))})")


def main(data: Path, out: Path) -> None:
    entries = json.loads((data / "emoji.json").read_text(encoding="utf-8"))
    pictures = sorted((data / "png" / "64").glob("*.png"))
    codes = [path.stem for path in pictures if path.stem in entries]
    thumbnails = np.stack([thumbnail(data / "png" / "64" / f"{code}.png") for code in codes])
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in zip(("train", "val"), split(codes, thumbnails), strict=True):
        write(out / f"{name}.jsonl", (row(code, entries[code]) for code in chosen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
