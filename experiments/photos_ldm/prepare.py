"""What the commands of run.sh need to know about photos: prepare.py tables DATASET | classes FOLDER.

`tables` writes tables/train.csv and tables/val.csv, with the photos and coarse classes of Grocery Store's published
splits. `classes` prints the subfolders of a folder of one's own as a list.
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_parts"))

import groceries


def tables(dataset: Path) -> None:
    out = Path("tables")
    out.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "class"))
            table.writerows((photo.path, photo.coarse) for photo in groceries.read_photos(dataset, split))


def classes(folder: Path) -> None:
    print(json.dumps(sorted(path.name for path in folder.iterdir() if path.is_dir()), ensure_ascii=False))


if __name__ == "__main__":
    {"tables": tables, "classes": classes}[sys.argv[1]](Path(sys.argv[2]))
