"""Write the tables of the Grocery Store photos for `mmlab shards build images`: prepare.py DATASET.

The working folder gets tables/train.csv and tables/val.csv, with the photos and coarse classes of the published splits.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "real_parts"))

import groceries


def write_tables(dataset: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with (out / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(("image", "class"))
            table.writerows((photo.path, photo.coarse) for photo in groceries.read_photos(dataset, split))


if __name__ == "__main__":
    write_tables(Path(sys.argv[1]), Path("tables"))
