import io
import json
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.data.sources.scenes import COLORS
from mmlab.data.sources.shapes import shapes


def draw(count=300, **options) -> list[tuple[dict, np.ndarray]]:
    scenes = []
    for key, members in shapes(count, **options):
        record = json.loads(json.dumps(members["json"]))
        assert record["id"] == key
        data = members["png"]
        assert isinstance(data, bytes)
        scenes.append((record, np.asarray(Image.open(io.BytesIO(data)))))
    return scenes


@pytest.fixture(scope="module")
def scenes():
    return draw(size=64)


def test_a_scene_depends_only_on_seed_split_and_number():
    assert list(shapes(5)) == list(shapes(20))[:5]
    first = [members["png"] for _, members in shapes(5)]
    assert first != [members["png"] for _, members in shapes(5, seed=1)]
    assert first != [members["png"] for _, members in shapes(5, split="val")]
    assert {key for key, _ in shapes(5)}.isdisjoint(key for key, _ in shapes(5, split="val"))


def test_boxes_are_where_the_colors_are(scenes):
    for record, image in scenes:
        assert image.shape == (64, 64, 3)
        for entry in record["boxes"]:
            color = np.array(COLORS[entry["category"].split()[0]])
            x1, y1, x2, y2 = entry["box"]
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            inside = image[int(y1 * 64) : int(y2 * 64) + 1, int(x1 * 64) : int(x2 * 64) + 1].astype(int)
            assert (abs(inside - color).max(-1) < 3).mean() > 0.1
            if len(record["boxes"]) == 1:  # alone: the box is tight around everything that is not ground
                drawn = (abs(image.astype(int) - image[0, 0]).max(-1) > 8).nonzero()
                edges = [drawn[1].min(), drawn[0].min(), drawn[1].max() + 1, drawn[0].max() + 1]
                assert abs(np.array(edges) - np.array(entry["box"]) * 64).max() < 1.5
            assert abs(image[0, 0].astype(int) - 240).max() <= 16  # the ground is light


def test_the_caption_names_the_boxes_from_left_to_right(scenes):
    for record, _ in scenes:
        assert [box["box"][0] + box["box"][2] for box in record["boxes"]] == sorted(
            box["box"][0] + box["box"][2] for box in record["boxes"]
        )
        named = re.split(r", | and ", record["caption"])
        assert [re.sub(r"^an? (small )?", "", name) for name in named] == [box["category"] for box in record["boxes"]]
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", record["caption"])


def solve(question: str, boxes: list[dict]) -> list[str]:
    """Every answer that the scene allows: one, if the question is unambiguous."""
    things = [entry["category"].split() + [entry["box"]] for entry in boxes]
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return [color for color, kind, _ in things if kind == match[1]]
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return [kind for color, kind, _ in things if color == match[1]]
    if question == "how many objects are there?":
        return [str(len(things))]
    if match := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return [str(sum(color == match[1] for color, _, _ in things))]
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        return [str(sum(match[1] in (kind + "s", kind + "es") for _, kind, _ in things))]
    if match := re.fullmatch(r"is there an? (\w+)(?: (\w+))?\?", question):
        named = {word for word in match.groups() if word and word != "object"}
        return ["yes" if any(named <= {color, kind} for color, kind, _ in things) else "no"]
    match = re.fullmatch(r"where is the (\w+) (\w+) relative to the (\w+) (\w+)\?", question)
    assert match, question
    [a], [b] = ([box for c, k, box in things if (c, k) == match.group(n, n + 1)] for n in (1, 3))
    dx, dy = (a[0] + a[2] - b[0] - b[2]), (a[1] + a[3] - b[1] - b[3])
    return [("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("below" if dy > 0 else "above")]


def test_each_question_has_one_answer_which_is_the_records(scenes):
    types = Counter()
    for record, _ in scenes:
        for entry in record["questions"]:
            assert solve(entry["question"], record["boxes"]) == [entry["answer"]], (entry, record["boxes"])
            types[entry["type"]] += 1
    assert set(types) == {"color", "shape", "count", "position", "yesno"}


def test_yes_and_no_cannot_be_guessed():
    """The majority answer of each question's text is right for hardly more than half of fresh pictures."""
    seen: dict[str, Counter] = {}
    for record, _ in draw(1500, size=16):
        for entry in record["questions"]:
            if entry["type"] == "yesno":
                seen.setdefault(entry["question"], Counter())[entry["answer"]] += 1
    total = sum(map(Counter.total, seen.values()))
    assert sum(answers["yes"] for answers in seen.values()) == total / 2
    for question, answers in seen.items():
        if answers.total() >= 100:
            assert 0.3 < answers["yes"] / answers.total() < 0.7, question


def test_dialogues_take_turns_and_show_the_image_first(scenes):
    lengths = set()
    for record, _ in scenes:
        turns = record["conversations"]
        lengths.add(len(turns) // 2)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert sum("<image>" in turn["value"] for turn in turns) == 1
        humans = [turn["value"].removeprefix("<image>\n") for turn in turns[::2]]
        answers = {entry["question"]: (entry["answer"], entry["type"]) for entry in record["questions"]}
        assert [answers[question][0] for question in humans] == [turn["value"] for turn in turns[1::2]]
        types = [answers[question][1] for question in humans]
        assert len(set(types)) == len(types)  # a second yes/no answer would follow from the first
    assert lengths == {2, 3}


def test_sizes_and_object_counts():
    for record, image in draw(20, size=32, min_objects=4, max_objects=4):
        assert image.shape == (32, 32, 3) and len(record["boxes"]) == 4


def test_only_the_named_kinds_occur_and_are_asked_for():
    for record, _ in draw(60, kinds=("circle", "star")):
        text = json.dumps(record)
        assert not any(kind in text for kind in ("square", "triangle", "diamond", "cross"))
    with pytest.raises(ConfigError, match=r"not 'cirle'\. Did you mean 'circle'"):
        next(shapes(1, kinds=["star", "cirle"]))


def test_only_the_named_sizes_occur():
    for size, edges in (("large", (0.3, 0.4)), ("small", (0.17, 0.24))):
        for record, _ in draw(20, max_objects=1, kinds=["circle"], sizes=[size]):
            x1, _, x2, _ = record["boxes"][0]["box"]
            assert edges[0] < x2 - x1 < edges[1] and ("small" in record["caption"]) == (size == "small")
    with pytest.raises(ConfigError, match=r"sizes can be small, large, not 'big'"):
        next(shapes(1, sizes=["big"]))


def test_only_questions_of_the_named_types_are_kept(scenes):
    chosen = draw(300, size=64, types=("count", "position"))
    for (record, image), (whole, same) in zip(chosen, scenes, strict=True):
        assert (image == same).all() and record["caption"] == whole["caption"]
        kept = [entry for entry in whole["questions"] if entry["type"] in ("count", "position")]
        assert record["questions"] == kept
        asked = {entry["question"] for entry in kept}
        assert all(turn["value"].removeprefix("<image>\n") in asked for turn in record["conversations"][::2])
    alone, _ = draw(1, max_objects=1, types=["position"])[0]  # no question applies
    assert "questions" not in alone and "conversations" not in alone and alone["caption"]
    with pytest.raises(ConfigError, match=r"types can be .*, not 'cuont'\. Did you mean 'count'"):
        next(shapes(1, types=["cuont"]))


def test_some_types_are_asked_only_about_a_single_object(scenes):
    chosen = draw(300, size=64, single_types=["color", "shape"])
    for (record, _), (whole, _) in zip(chosen, scenes, strict=True):
        types = {"count", "position", "yesno"} | ({"color", "shape"} if len(whole["boxes"]) == 1 else set())
        assert record["questions"] == [entry for entry in whole["questions"] if entry["type"] in types]
    with pytest.raises(ConfigError, match=r"single_types can be .*, not 'colour'\. Did you mean 'color'"):
        next(shapes(1, single_types=["colour"]))


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"max_objects": 9}, {"min_objects": 4}, {"size": 4}, {"kinds": ()}, {"types": ()}]
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError):
        next(shapes(**{"count": 1, **options}))
