"""The split of experiments/emoji_ldm: no validation emoji is in training in another skin tone, gender or spelling."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PATH = Path(__file__).parents[1] / "experiments" / "emoji_ldm" / "prepare.py"


@pytest.fixture(scope="module")
def prepare():
    spec = spec_from_file_location("emoji_prepare", PATH)
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def codes() -> list[str]:
    """300 hands and faces, a third in five skin tones, a third in two genders; flags; a family."""
    codes = []
    for i in range(300):
        one = f"{0x1F400 + i:x}"
        variants = {0: [f"-1f3f{tone}" for tone in "bcdef"], 1: ["-2640", "-2642", "-200d-2640-fe0f"], 2: []}
        codes += [one, *(one + variant for variant in variants[i % 3])]
    codes += [f"1f1e6-{0x1F1E6 + i:x}" for i in range(26)]
    return [*codes, "1f3fb", "1f3f4-e0067-e0062", "1f3f4-e0067-e0063", "1f468-1f469-1f466"]


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("code", "base"),
    [
        ("1f44b", "1f44b"),
        ("1f44b-1f3fd", "1f44b"),
        ("1f986-2640", "1f986"),
        ("1f468-200d-1f469-200d-1f466", "1f468"),
        ("1f1e6-1f1e8", "1f1e6-1f1e8"),
        ("1f3f4-e0067-e0062", "1f3f4-e0067-e0062"),
        ("1f3fb", "1f3fb"),
        ("0023-20e3", "0023"),
    ],
)
def test_the_base_of_an_emoji(prepare, code, base):
    assert prepare.base(code) == base


def test_no_variant_of_a_validation_emoji_is_in_training(prepare):
    every = codes()
    train, val = prepare.split(every, random_images(len(every)))
    trained = {prepare.base(code) for code in train}
    held_out = [prepare.base(code) for code in val]
    assert trained.isdisjoint(held_out) and set(train) <= set(every) and set(val) <= set(every)
    assert len(held_out) == len(set(held_out)) and not any(prepare.toned(code) for code in val)
    assert 20 < len(val) < 50, "about a tenth of 329 groups"
    assert any(prepare.toned(code) for code in train)
    left = set(every) - set(train) - set(val)
    assert all(prepare.base(code) in held_out for code in left), "only variants of validation emojis are left out"


def test_similar_images_stay_together(prepare):
    every = [f"{0x1F400 + i:x}" for i in range(200)]
    pictures = random_images(100).repeat(2, 0)
    pictures[1::2, :2, :2] ^= 3  # every second image is nearly equal to the one before
    group = prepare.groups(every, pictures)
    assert all(group[a] == group[b] for a, b in zip(every[::2], every[1::2], strict=True))
    assert len(set(group.values())) == 100
    train, val = prepare.split(every, pictures)
    assert {group[code] for code in train}.isdisjoint(group[code] for code in val)


def test_the_split_of_an_emoji_does_not_depend_on_the_others(prepare):
    every = codes()
    pictures = random_images(len(every))
    _, val = prepare.split(every, pictures)
    _, of_half = prepare.split(every[:150], pictures[:150])
    assert set(of_half) == set(val) & set(every[:150])


def test_captions_and_classes(prepare):
    heart = {"name": "red_heart", "category": "symbols", "keywords": ["Love", "heart", "a", "b", "c"]}
    assert prepare.caption(heart) == "red heart, love, b, c"
    assert prepare.row("2764", heart)["class"] == "symbols"
    flag = {"name": "Fiji", "category": "flags", "keywords": []}
    assert prepare.caption(flag) == "flag of fiji"
    assert prepare.row("x", {**heart, "category": ""})["class"] == "other"


def test_the_tables_contain_images_with_a_record(prepare, tmp_path, capsys):
    folder = tmp_path / "png" / "64"
    folder.mkdir(parents=True)
    entries = {}
    for i, pixels in enumerate(random_images(60)):
        Image.fromarray(pixels).save(folder / f"{0x1F400 + i:x}.png")
        if i:
            entries[f"{0x1F400 + i:x}"] = {"name": f"thing {i}", "category": "objects", "keywords": []}
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    prepare.main(tmp_path, tmp_path / "out")
    rows = [
        json.loads(line)
        for name in ("train", "val")
        for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
    ]
    assert sorted(row["image"] for row in rows) == sorted(f"{code}.png" for code in entries)
    assert rows[0] == {"image": "1f401.png", "class": "objects", "caption": "thing 1"}
    assert "val.jsonl" in capsys.readouterr().out
