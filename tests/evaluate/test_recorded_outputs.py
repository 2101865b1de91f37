"""Recorded outputs and right answers in the formats of their data sets."""

import json

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.evaluate.scores.recorded_outputs import Recorded, read_predictions, read_references
from mmlab.evaluate.scores.score_table import Reference
from tests.tiny_problems import problem, write_problems


@pytest.fixture
def write(tmp_path):
    def file(content, name: str = "file.json"):
        path = tmp_path / name
        lines = isinstance(content, tuple)
        path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content))
        return path

    return file


@pytest.mark.parametrize(
    "content",
    [
        {"outputs": {"1": "B", "2": "no"}, "acc": 50.0},
        {"1": "B", "2": "no"},
        ({"question_id": 1, "prompt": "?", "text": "B", "answer_id": "x"}, {"question_id": 2, "text": "no"}),
        [{"question_id": 1, "answer": "B"}, {"question_id": 2, "answer": "no"}],
        [{"questionId": "1", "prediction": "B"}, {"questionId": "2", "prediction": "no"}],
        [{"image_id": 1, "caption": "B"}, {"image_id": 2, "caption": "no"}],
        ({"key": "1", "answer": "right", "prediction": "B"}, {"key": "2", "answer": "right", "prediction": "no"}),
        ({"key": "1", "description": "B", "caption": "right"}, {"key": "2", "description": "no", "caption": "right"}),
    ],
)
def test_predictions(write, content):
    assert read_predictions(write(content)).texts == {"1": "B", "2": "no"}


def test_one_line_is_a_line(write):
    assert read_predictions(write(({"question_id": 3, "text": "B"},))).texts == {"3": "B"}
    assert read_references("exact", write(({"key": 3, "answers": ["B"]},)), None, "") == [
        Reference("3", ("B",), (), "3")
    ]


def test_a_byte_order_mark_is_ignored(write):
    path = write({"1": "B"})
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_predictions(path).texts == {"1": "B"}


def test_a_text_may_hold_any_line_break(write):
    content = ({"question_id": 1, "text": "a\u2028b\x0bc"}, {"question_id": 2, "text": "d"})
    path = write(content)
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in content))
    assert read_predictions(path).texts == {"1": "a\u2028b\x0bc", "2": "d"}


def test_recorded_indices(write):
    recorded = read_predictions(write({"outputs": {"1": "B"}, "results": {"1": 1}}))
    assert recorded == Recorded({"1": "B"}, {"1": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"outputs": {"1": 2}}, "such as '1': The prediction must be a text, not int"),
        ({"outputs": ["B"]}, "has no predictions"),
        ({"outputs": {"1": "B"}, "results": {"1": "B"}}, "the index recorded for 1 must be an integer, not 'B'"),
        ({}, "has no predictions"),
        ([{"id": 1, "text": "B"}, {"id": 1, "text": "C"}], "two predictions for 1"),
        ([{"id": 1}], "'entry 0': Expected an object with an id"),
        (["B"], "'entry 0': Expected"),
    ],
)
def test_other_predictions_are_refused(write, content, message):
    with pytest.raises(DataError, match=message):
        read_predictions(write(content))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "answers.json").write_text('{"1": "B"')
    with pytest.raises(DataError, match="neither JSON nor JSON lines"):
        read_predictions(tmp_path / "answers.json")
    (tmp_path / "answers.json").write_bytes(b'{"1": "\xff"}')
    with pytest.raises(DataError, match="line 1, is not UTF-8"):
        read_predictions(tmp_path / "answers.json")
    with pytest.raises(DataError, match=r"Did you mean 'answers\.json'"):
        read_predictions(tmp_path / "answer.json")


def test_predictions_are_aligned_with_references():
    references = [Reference("2", ("x",)), Reference("1", ("x",)), Reference("9", ("x",))]
    assert Recorded({"1": "B", "2": "no", "5": "?"}).aligned(references) == ["no", "B", None]
    with pytest.raises(DataError, match="no prediction has the id of a question; examples of ids are 'a' and '2'"):
        Recorded({"a": "B"}).aligned(references)


def test_scienceqa(tmp_path):
    root = write_problems(tmp_path / "sqa", {"1": problem(), "2": problem(split="val"), "3": problem(answer=0)})
    files = root / "problems.json", root / "pid_splits.json"
    expected = [
        Reference("1", ("B",), ("NAT", "NO", "G1-6"), "1", 2),
        Reference("3", ("A",), ("NAT", "NO", "G1-6"), "3", 2),
    ]
    assert read_references("scienceqa", *files, "test") == expected
    assert read_references("scienceqa", root, None, "test") == expected
    assert len(read_references("scienceqa", files[0], None, "val")) == 1
    with pytest.raises(DataError, match="no split 'tset'"):
        read_references("scienceqa", *files, "tset")
    with pytest.raises(DataError, match=r"problems\.json does not hold {split: \[problem id, …\]}: '1' is not a list"):
        read_references("scienceqa", files[0], files[0], "test")
    write_problems(root, {"1": problem()}, {"test": ["1"], "minitest": []})
    with pytest.raises(DataError, match="has no right answers of split minitest"):
        read_references("scienceqa", root, None, "minitest")


def test_vqa(write):
    answers = [{"answer": "red", "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]
    one = {"question_id": 7, "image_id": 3, "answers": answers, "answer_type": "other", "question_type": "what color"}
    [reference] = read_references("vqa", write({"annotations": [one], "info": {}}), None, "")
    assert reference == Reference("7", ("red",) * 10, ("other", "what color"), "3")


def test_gqa(write):
    questions = {
        "201": {"imageId": "n1", "answer": "boy", "types": {"structural": "query", "semantic": "rel", "detailed": "x"}},
        "202": {"imageId": "n1", "answer": "no", "types": {"structural": "verify", "semantic": "obj"}},
        "203": {"answer": "yes"},
        "204": {"answer": "yes", "isBalanced": False},
    }
    assert read_references("gqa", write(questions), None, "") == [
        Reference("201", ("boy",), ("query", "rel", "open"), "n1"),
        Reference("202", ("no",), ("verify", "obj", "binary"), "n1"),
        Reference("203", ("yes",)),
    ]


def test_pope(write):
    lines = ({"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"},)
    assert read_references("pope", write(lines, "coco_pope_popular.json"), None, "") == [
        Reference("1", ("yes",), ("popular",), "a.jpg")
    ]
    own = ({"question_id": 1, "text": "?", "label": "no", "category": "random"}, {"question_id": 2, "label": "yes"})
    assert [r.types for r in read_references("pope", write(own, "labels.jsonl"), None, "")] == [
        ("random",),
        ("labels",),
    ]


def test_mme(tmp_path):
    (tmp_path / "count.txt").write_text("a.png\tTwo?\tYes\tyes\na.png\tThree?\tNo\tNo, two.\n")
    references = read_references("mme", tmp_path, None, "")
    assert references == [
        Reference("count/a.png/Two?", ("Yes",), ("count",), "a.png"),
        Reference("count/a.png/Three?", ("No",), ("count",), "a.png"),
    ]
    assert read_predictions(tmp_path).aligned(references) == ["yes", "No, two."]
    (tmp_path / "count.txt").write_text("a.png\tTwo?\tYes\n")
    assert len(read_references("mme", tmp_path, None, "")) == 1
    with pytest.raises(DataError, match=r"count\.txt, line 1': Expected 4 cells separated by tabs, not 3"):
        read_predictions(tmp_path)


def test_captions(write):
    coco = {
        "annotations": [
            {"image_id": 5, "caption": "a"},
            {"image_id": 6, "caption": "b"},
            {"image_id": 5, "caption": "c"},
        ]
    }
    assert read_references("captions", write(coco), None, "") == [
        Reference("5", ("a", "c"), (), "5"),
        Reference("6", ("b",), (), "6"),
    ]


def test_lines_of_our_own(write):
    lines = (
        {"key": "q1", "answers": ["red", "crimson"], "types": ["color"], "picture": "p", "choices": 0},
        {"key": "q2", "answers": ["2"]},
    )
    assert read_references("exact", write(lines), None, "") == [
        Reference("q1", ("red", "crimson"), ("color",), "p"),
        Reference("q2", ("2",), (), "q2"),
    ]


@pytest.mark.parametrize(
    ("metric", "content", "message"),
    [
        ("vqa", {"questions": []}, "does not have the format of its data set: KeyError"),
        ("gqa", {"1": "boy"}, "does not have the format"),
        ("pope", ({"question_id": 1, "text": "?"},), "does not have the format"),
        ("exact", {"1": "boy"}, "has no lines of {key, answers"),
        ("vqa", {"annotations": []}, "has no right answers"),
        ("exact", ({"key": "1", "answers": ["a"]}, {"key": "1", "answers": ["b"]}), "two right answers for 1"),
        ("vqa", ({"key": "1", "answers": []},), "such as '1': There is no right answer"),
        (
            "vqa",
            {"annotations": [{"question_id": 1, "answers": []}]},
            "such as '1': There is no right answer",
        ),
        ("exact", [{"key": "1", "answers": "red"}], "answers must be a list, not 'red'"),
    ],
)
def test_other_references_are_refused(write, metric, content, message):
    with pytest.raises(DataError, match=message):
        read_references(metric, write(content), None, "")


def test_splits_are_scienceqa_s(write):
    with pytest.raises(ConfigError, match="metric=vqa has no splits"):
        read_references("vqa", write({}), "pid_splits.json", "test")


def test_bad_entries_are_counted(write):
    good = [{"key": str(n), "answers": ["a"]} for n in range(3)]
    bad = BadSamples("references", 0, unit="question")
    lines = (*good, {"key": "x", "answers": "a"}, {"answers": ["a"]}, "?", {"key": "y", "answers": []})
    assert [one.key for one in read_references("exact", write(lines), None, "", bad)] == ["0", "1", "2"]
    assert bad.reasons == {"format": 3, "no-answer": 1} and list(bad.errors) == ["entry 3", "entry 4", "entry 5", "y"]
    bad = BadSamples("predictions", 0, unit="prediction")
    assert read_predictions(write({"1": "B", "2": None}), bad).texts == {"1": "B"}
    assert read_predictions(write([{"id": 1, "text": "B"}, {"id": 2}, {"id": 3, "text": 4}]), bad).texts == {"1": "B"}
    assert str(bad).startswith("3 predictions cannot be used (format 3), such as '2': The prediction must be a text")
    annotations = {"annotations": [{"image_id": 1, "caption": "a dog"}, {"image_id": 2}]}
    assert len(read_references("captions", write(annotations), None, "", bad)) == 1


def test_more_bad_entries_than_the_budget_allows(write):
    predictions = {str(n): "B" if n % 2 else None for n in range(30)}
    with pytest.raises(DataError, match=r"11 predictions cannot be used .* of 30, which is more than bad_budget"):
        read_predictions(write(predictions))
