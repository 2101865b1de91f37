"""The experiment photos_ldm: the tables of the published splits, and the classes of a folder."""

import csv
import subprocess
import sys
from pathlib import Path

from mmlab.config.compose import compose

FOLDER = Path(__file__).parents[1] / "experiments" / "photos_ldm"
CLASSES = [
    ["Class Name (str)", "Class ID (int)", "Coarse Class Name (str)", "Coarse Class ID (int)"],
    ["Golden-Delicious", "0", "Apple", "0"],
    ["Lime", "1", "Lime", "1"],
]


def prepare(command: str, folder: Path) -> str:
    arguments = [sys.executable, str(FOLDER / "prepare.py"), command, str(folder)]
    return subprocess.run(arguments, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_tables_have_the_photos_that_are_there_and_their_coarse_classes(tmp_path):
    with (tmp_path / "classes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(CLASSES)
    apple, lime, carton = "train/Fruit/Apple/a.jpg", "val/Fruit/Lime/b.jpg", "train/Packages/Milk/c.jpg"
    for path in (apple, lime):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
    (tmp_path / "train.txt").write_text(f"{apple}, 0, 0\n{carton}, 1, 1\n")
    (tmp_path / "val.txt").write_text(f"{lime}, 1, 1\n")
    prepare("tables", tmp_path)
    assert (tmp_path / "tables/train.csv").read_text().splitlines() == ["image,class", f"{apple},Apple"]
    assert (tmp_path / "tables/val.csv").read_text().splitlines() == ["image,class", f"{lime},Lime"]


def test_the_classes_of_a_folder_are_its_subfolders_as_the_recipe_reads_them(tmp_path):
    names = ["Apple", "O'Henry", "Red, round Beet", "Äpfel"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "readme.txt").touch()
    cfg = compose("train", ["experiment=photos/class", f"model.conditioner.classes={prepare('classes', tmp_path)}"])
    assert cfg.model.conditioner.classes == names
