"""The classes of the Grocery Store photos in words, what is asked about a photo, and which class a text names."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

COARSE_WORDS = {
    "Red-Beet": "beet",
    "Brown-Cap-Mushroom": "mushroom",
    "Red-Grapefruit": "grapefruit",
    "Satsumas": "satsuma",
    "Carrots": "carrot",
    "Aubergine": "eggplant",
}
"""Everyday words of coarse classes whose names are not such words."""
PROPER = ("Apple", "Pear")
"""Coarse classes whose fine classes are proper names."""
# Question → form of the answer. Each question has one wording of its answer, so that the wording is no guess.
DESCRIBE = {
    "What is this?": "A photo of {what}.",
    "Describe the photo.": "A close photo of {what}.",
    "What do you see?": "A picture of {what}.",
}
KIND = "Is it a fruit or a vegetable?"


@dataclass(frozen=True)
class Photo:
    """One photo: its path below the data set's folder, and its classes' names as in classes.csv."""

    path: str
    fine: str
    coarse: str

    @property
    def kind(self) -> str:
        """`fruit` or `vegetable`, which is a folder of the path."""
        return {"Fruit": "fruit", "Vegetables": "vegetable"}[self.path.split("/")[1]]

    @property
    def what(self) -> str:
        """Coarse and fine class in words, such as "an apple, a Granny Smith apple"."""
        coarse, fine = coarse_word(self.coarse), fine_words(self.fine, self.coarse)
        more = "" if fine.lower() == coarse else f", {article(fine)}"
        return article(coarse) + more


def read_photos(folder: Path, split: str) -> list[Photo]:
    """The photos of `train.txt` or `val.txt` that are in the folder: it has a part of the published ones."""
    with (folder / "classes.csv").open(encoding="utf-8") as file:
        rows = [row[:4] for row in csv.reader(file)][1:]
    fine, coarse = {row[1]: row[0] for row in rows}, {row[3]: row[2] for row in rows}
    lines = [line.split(", ") for line in (folder / f"{split}.txt").read_text(encoding="utf-8").split("\n") if line]
    return [Photo(path, fine[f], coarse[c.strip()]) for path, f, c in lines if (folder / path).is_file()]


def coarse_word(coarse: str) -> str:
    """The coarse class as a word: Brown-Cap-Mushroom → mushroom."""
    return COARSE_WORDS.get(coarse, coarse.replace("-", " ").lower())


def fine_words(fine: str, coarse: str) -> str:
    """The fine class in words that end with the coarse class: Granny-Smith → Granny Smith apple."""
    if fine == coarse and coarse in ("Carrots", "Satsumas", "Aubergine"):
        return coarse_word(coarse)
    words, word = fine.replace("-", " "), coarse_word(coarse)
    words = words if coarse in PROPER or fine == "Galia-Melon" else words.lower()
    return words.replace("Melon", "melon") if word in words.lower() else f"{words} {word}"


def article(words: str) -> str:
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def lexicon(photos: list[Photo]) -> dict[str, str]:
    """Words → coarse class, for every class of the photos; lower case, singular."""
    names: dict[str, str] = {}
    for photo in photos:
        names[coarse_word(photo.coarse)] = photo.coarse
        names[fine_words(photo.fine, photo.coarse).lower()] = photo.coarse
    return names


def named(text: str, names: dict[str, str]) -> set[str]:
    """The coarse classes that a text names.

    Longer names come first, and what belongs to one is not read again: an "orange bell pepper" names no orange, and a
    "pineapple" no apple. Plurals count; hyphens are spaces.
    """
    forms = {form: names[name] for name in names for form in (name, f"{name}s", f"{name}es", re.sub("y$", "ies", name))}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return {forms[found] for found in re.findall(rf"\b(?:{pattern})\b", text.lower().replace("-", " "))}


def is_right(text: str, coarse: str, names: dict[str, str]) -> bool:
    """The rule of `coarse_correct`: the text names the photo's coarse class, and no other coarse class."""
    return named(text, names) == {coarse}
