"""ScienceQA's official layout becomes shards in LLaVA's published form."""

import json
from dataclasses import replace

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import Prompt
from mmlab.data.dialogues import conversations_of
from mmlab.data.sources.drawn_problems import write_problems as draw_problems
from mmlab.data.sources.scenes import COLORS, KINDS
from mmlab.data.sources.scienceqa import COLUMNS, load_problems, load_split, scienceqa
from tests.tiny_builds import built
from tests.tiny_files import png
from tests.tiny_problems import problem, write_problems


@pytest.fixture
def build(tmp_path):
    def make(problems, splits=None, **options):
        root = write_problems(tmp_path / "raw", problems, splits)
        return built(scienceqa(root, **options), tmp_path / "out")

    return make


def turns(index, n: int) -> list[str]:
    return [turn["value"] for turn in json.loads(index.read(n)["json"])["conversations"]]


def turns_of(build, form: str = "QCM-LEA", **changes) -> list[str]:
    """Question and reply of one problem without a picture."""
    return turns(build({"1": problem(**changes)}, split="test", form=form)[0], 0)


def test_the_published_form(build):
    assert turns_of(build) == [
        "What is it made of?\nContext: N/A\nOptions: (A) wood (B) glass",
        "Glass is clear. One can see through it. The answer is B.",
    ]
    index, _ = build(
        {"7": problem(image="image.png", hint="A window.", choices=["a", "b", "c", "d", "e"])}, split="test"
    )
    assert turns(index, 0)[0] == (
        "What is it made of?\nContext: A window.\nOptions: (A) a (B) b (C) c (D) d (E) e\n<image>"
    )
    assert list(index.keys) == ["7"] and index.read(0)["png"] == png()
    record = json.loads(index.read(0)["json"])
    assert record["id"] == "7"
    assert record["reference"] == {"answers": ["B"], "choices": 5, "types": ["NAT", "TXT", "IMG", "G1-6"]}


def test_the_answer_may_come_first(build):
    assert turns_of(build, "QCM-ALE")[1] == "The answer is B. BECAUSE: Glass is clear. One can see through it."
    assert turns_of(build, "QCM-ALE", lecture="", solution="")[1] == "The answer is B."
    assert turns_of(build, "QCM-ALE", lecture=None)[1] == "The answer is B. BECAUSE: One can see through it."


@pytest.mark.parametrize(
    ("changes", "question", "reply"),
    [
        # Two spaces become one, once; three become two.
        ({"question": "a  b   c"}, "a b  c\nContext: N/A\nOptions: (A) wood (B) glass", None),
        # Line breaks stay; those that are written as \n become some in the reply alone.
        ({"hint": "one\ntwo"}, "What is it made of?\nContext: one\ntwo\nOptions: (A) wood (B) glass", None),
        ({"lecture": "one\\ntwo\nthree"}, None, "one\ntwo\nthree One can see through it. The answer is B."),
        # The name of the first field goes wherever it stands.
        ({"hint": "Question: why?"}, "What is it made of?\nContext: why?\nOptions: (A) wood (B) glass", None),
        ({"solution": "Answer: glass."}, None, "Glass is clear. glass. The answer is B."),
        ({"lecture": ""}, None, "One can see through it. The answer is B."),
        # A BECAUSE at the end takes all others along.
        ({"choices": ["BECAUSE: a", "BECAUSE:"]}, "What is it made of?\nContext: N/A\nOptions: (A)  a (B)", None),
        # Without any reasoning the published text begins with a space.
        ({"lecture": "", "solution": ""}, None, " The answer is B."),
        ({"hint": None, "solution": None}, "What is it made of?\nContext: N/A\nOptions: (A) wood (B) glass", None),
    ],
)
def test_texts_are_those_of_the_published_converter(build, changes, question, reply):
    turns = turns_of(build, **changes)
    assert question in (None, turns[0]) and reply in (None, turns[1])


def test_captions_are_in_the_context(build, tmp_path):
    table = tmp_path / "captions.json"
    table.write_text(json.dumps({"captions": {"1": "a window", "9": "unused"}}))
    problems = {"1": problem(hint="Look."), "2": problem(), "3": problem(hint="Look.")}
    index, tally = build(problems, split="test", captions=table)
    assert [turns(index, n)[0].split("\n")[1] for n in range(3)] == [
        "Context: Look. a window",
        "Context: N/A",
        "Context: Look.",
    ]
    assert tally.details["captioned"] == 1
    table.write_text(json.dumps({"1": "a pane"}))
    assert "Context: Look. a pane" in turns(build(problems, split="test", captions=table)[0], 0)[0]
    table.write_text("[]")
    with pytest.raises(DataError, match="does not hold"):
        build(problems, split="test", captions=table)


def test_images_that_are_missing_leave_text_and_are_counted(build, tmp_path):
    problems = {
        "1": problem(image="image.png"),
        "2": problem(image="gone.png"),
        "3": problem(),
        "4": problem(image="page.png"),
    }
    write_problems(tmp_path / "raw", problems)
    page = tmp_path / "raw" / "images" / "test" / "4" / "page.png"
    options = {"split": "test"}
    build(problems, **options)
    page.write_bytes(b"<html>404")
    index, tally = built(scienceqa(tmp_path / "raw", "test"), tmp_path / "again")
    assert tally.counts() == {
        **{"rows": 4, "samples": 4},
        **{"with_picture": 1, "text_only": 1, "missing": 1, "unsupported": 1},
    }
    marked = ["<image>" in turns(index, n)[0] for n in range(4)]
    assert marked == [True, False, False, False]
    assert json.loads(index.read(1)["json"])["reference"]["types"] == ["NAT", "IMG", "G1-6"], (
        "the problem stays what it is"
    )
    with pytest.raises(DataError, match=r"problem 4: image 'test/4/page\.png' is neither.*: 2, .* allows 1"):
        built(scienceqa(tmp_path / "raw", "test", missing_budget=0.4), tmp_path / "strict")


def test_without_any_image_folder_everything_is_text(build):
    problems = {"1": problem(image="gone.png"), "2": problem()}
    index, tally = build(problems, split="test")
    assert tally.counts() == {"rows": 2, "samples": 2, "with_picture": 0, "text_only": 1, "missing": 1}
    assert index.extensions(0) == ["json"]
    with pytest.raises(DataError, match=r"there is no image folder .*, but 1 problems"):
        build(problems, split="test", missing_budget=0)


def test_official_splits_and_their_order(build):
    problems = {name: problem(split="train" if name != "3" else "val") for name in "1234"}
    index, _ = build(problems, {"train": ["4", "1"], "val": ["3"], "minival": ["2", "3"]})
    assert list(index.keys) == ["4", "1"]
    assert list(build(problems, {"minival": ["2", "3"]}, split="minival")[0].keys) == ["2", "3"]
    with pytest.raises(DataError, match=r"no split 'tran'; there are train, val\. Did you mean 'train'"):
        build(problems, split="tran")


def test_without_a_file_of_splits_the_problems_state_theirs(tmp_path):
    root = write_problems(tmp_path, {"1": problem(), "2": problem(split="val")})
    (root / "pid_splits.json").unlink()
    assert [one.id for one in load_split(None, "val", load_problems(root / "problems.json"))] == ["2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 2}, "problem 1: answer 2 is not the position of one of its 2 choices"),
        ({"answer": -1}, "answer -1"),
        ({"answer": "B"}, "answer 'B'"),
        ({"answer": True}, "answer True"),
        ({"answer": None}, "answer None"),
        ({"choices": "AB"}, "choices are not a list of texts"),
        ({"choices": ["a", 2]}, "choices are not a list of texts"),
        ({"choices": ["a"]}, "it has 1 choices, not two to 5"),
        ({"choices": list("abcdef")}, "it has 6 choices"),
        ({"question": " "}, "the question is empty"),
        ({"question": 3}, "question must be text, not int"),
        ({"hint": ["x"]}, "hint must be text, not list"),
        ({"image": ["x"]}, "an image is named by one file, not list"),
        ({"subject": "natural sciences"}, "subject 'natural sciences' .* Did you mean 'natural science'"),
        ({"subject": None}, "subject None"),
        ({"grade": "grade13"}, "grade 'grade13' is not one of"),
    ],
)
def test_malformed_problems_are_errors(tmp_path, changes, message):
    root = tmp_path / "raw"
    write_problems(root, {"1": problem()})
    (root / "images").mkdir()
    (root / "problems.json").write_text(json.dumps({"1": problem(**changes)}))
    with pytest.raises(DataError, match=message):
        built(scienceqa(root, "test"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_image_outside_the_folder_is_not_read(tmp_path):
    root = write_problems(tmp_path, {"1": problem(image="../../../secret.png")})
    (root / "images").mkdir(exist_ok=True)
    index, tally = built(scienceqa(root, "test"), tmp_path / "out")
    assert index.extensions(0) == ["json"] and tally.details["outside"] == 1
    with pytest.raises(DataError, match="points outside"):
        built(scienceqa(root, "test", missing_budget=0), tmp_path / "strict")


@pytest.mark.parametrize(
    ("problems", "splits", "message"),
    [
        ("{", {}, "is not JSON"),
        ([], {}, "does not hold"),
        ({"1": "text"}, {"test": ["1"]}, "problem 1: expected an object, not str"),
        ({"1": problem()}, {"test": ["1", "2"]}, "names problem 2, which problems.json does not have"),
        ({"1": problem()}, {"test": ["1", "1"]}, "names problem 1 twice"),
        ({"1": problem()}, {"test": "1"}, "is not a list"),
        ({"1": problem()}, [], "does not hold"),
    ],
)
def test_other_layouts_are_refused(tmp_path, problems, splits, message):
    text = problems if isinstance(problems, str) else json.dumps(problems)
    (tmp_path / "problems.json").write_text(text)
    (tmp_path / "pid_splits.json").write_text(json.dumps(splits))
    with pytest.raises(DataError, match=message):
        scienceqa(tmp_path, "test")


def test_names_are_checked(tmp_path):
    write_problems(tmp_path, {"1": problem()})
    with pytest.raises(ConfigError, match="Did you mean 'QCM-LEA'"):
        scienceqa(tmp_path, "test", "QCM-LAE")
    with pytest.raises(DataError, match=r"there is no file .*problems\.json"):
        scienceqa(tmp_path / "nowhere", "test")


def test_it_is_one_turn_that_opens_with_the_image(build):
    index, _ = build({"1": problem(image="image.png")}, split="test")
    record = json.loads(index.read(0)["json"])
    [dialogue] = conversations_of(record, Prompt("v1"), 0, pictures=1)
    assert [turn.text for turn in dialogue] == [
        "<image>\nWhat is it made of?\nContext: N/A\nOptions: (A) wood (B) glass",
        "Glass is clear. One can see through it. The answer is B.",
    ]


def test_drawn_problems_are_in_the_layout(tmp_path):
    counts = draw_problems(tmp_path / "raw", {"train": 12, "test": 20}, size=16)
    assert counts == {"problems": 32, "pictures": 16}
    problems = load_problems(tmp_path / "raw" / "problems.json")
    test = load_split(tmp_path / "raw" / "pid_splits.json", "test", problems)
    assert {column for one in test for column in one.columns} == set(COLUMNS)
    assert {one.answer for one in problems.values()} == {0, 1, 2, 3}
    _, tally = built(scienceqa(tmp_path / "raw", "test"), tmp_path / "out")
    assert tally.counts() == {"rows": 20, "samples": 20, "with_picture": 10, "text_only": 10, "missing": 0}
    fewer = draw_problems(tmp_path / "again", {"train": 3}, size=16)
    assert fewer["problems"] == 3
    again = load_problems(tmp_path / "again" / "problems.json")
    assert [again[name] for name in "123"] == [problems[name] for name in "123"], "a problem depends on its place alone"
    draw_problems(tmp_path / "few", {"train": 8}, size=16, kinds=("star", "cross"))
    assert "circle" not in (tmp_path / "few" / "problems.json").read_text()
    with pytest.raises(ConfigError, match=r"not 'sqare'\. Did you mean 'square'"):
        draw_problems(tmp_path / "none", {"train": 1}, kinds=("star", "sqare"))
    with pytest.raises(ConfigError, match="two shapes"):
        draw_problems(tmp_path / "none", {"train": 1}, kinds=("star", "star"))
    with pytest.raises(ConfigError, match="is not empty"):
        draw_problems(tmp_path / "again", {"train": 3})
    with pytest.raises(ConfigError, match="no problem to write"):
        draw_problems(tmp_path / "none", {"train": 0})


def test_drawn_problems_differ_between_splits(tmp_path):
    """A test does not ask about scenes of the training set."""
    draw_problems(tmp_path / "raw", {"train": 40, "test": 40}, size=16)
    problems = load_problems(tmp_path / "raw" / "problems.json").values()
    train, test = ([replace(p, id="", split="") for p in problems if p.split == split] for split in ("train", "test"))
    assert not any(one == other for one, other in zip(train, test, strict=True))


@pytest.mark.parametrize("kinds", [("circle", "square", "triangle"), KINDS[:5]])
def test_words_can_have_fixed_letters(tmp_path, kinds):
    draw_problems(tmp_path / "raw", {"train": 120}, size=16, kinds=kinds, own_letters=True)
    places: dict[str, set[int]] = {}
    for one in load_problems(tmp_path / "raw" / "problems.json").values():
        places.setdefault(one.choices[one.answer], set()).add(one.answer)
        assert len(set(one.choices)) == len(one.choices) >= 2
    # The half of the colors that comes first, the other, and the shapes in their order.
    shapes = {kind: {number} for number, kind in enumerate(sorted(kinds))}
    colors = {name: {number % 4} for number, name in enumerate(COLORS)}
    assert places == colors | shapes
    for wrong in (KINDS, KINDS[:2]):
        with pytest.raises(ConfigError, match="three to 5 shapes"):
            draw_problems(tmp_path / "none", {"train": 1}, kinds=wrong, own_letters=True)
