"""A model that says the same to everything is told from one that looks at its images, whatever its score is."""

import pytest

from mmlab.evaluate.scores.caption_scores import captions
from mmlab.evaluate.scores.constant_reply import beside, blind_scores, variety, variety_line, with_baselines
from mmlab.evaluate.scores.score_table import UNTYPED, Reference, table
from mmlab.evaluate.scores.scorers import exact, facts
from mmlab.evaluate.scores.vqa import vqa
from mmlab.evaluate.scores.yes_no import mme, pope

THINGS = ["t-shirt", "shoe", "bag", "coat"]


def refer(answers: list[str], kind: str = "kind") -> list[Reference]:
    return [Reference(f"q{n}", (answer,), (kind,), f"p{n}") for n, answer in enumerate(answers)]


def test_a_captioner_that_always_says_the_same_equals_the_baseline():
    references = refer([f"A photo of a {THINGS[n % 4]}." for n in range(12)])
    replies = ["a photo of a T-shirt"] * 11 + ["A photo of a t-shirt."]
    scores = captions(replies, references)
    found = with_baselines(captions, replies, references)
    assert found["replies"] == {"distinct": 1, "commonest": "a photo of a T-shirt", "commonest_share": 1}
    assert scores.all["bleu_4"] > 0.5 and found["constant"]["cider_d"] >= scores.all["cider_d"] > 0  # type: ignore[operator]
    assert found["constant"]["types"]["kind"].keys() == scores.types["kind"].keys()
    good = captions([r.answers[0] for r in references], references)
    assert good.all["cider_d"] > found["constant"]["cider_d"]
    summary = {**scores.as_json(), **found}
    head, *_, last = table(summary, scores.main).splitlines()
    assert head.split()[-1] == "constant" and float(last.split()[-1]) == pytest.approx(scores.all["cider_d"], abs=1e-3)
    line = "1 distinct reply to 12 questions; 100.0% are 'a photo of a T-shirt'"
    assert variety_line(found["replies"], 12) == line and beside("cider_d", summary).endswith(line)


@pytest.mark.parametrize(
    ("scorer", "answers", "reply", "value"),
    [
        (exact, ["red", "blue", "Red.", "green"], "red", 0.5),
        (vqa, ["yes", "no", "no"], "no", 2 / 3),
        (pope, ["yes", "no"] * 5, "yes", 0.5),
    ],
)
def test_the_best_constant_answer(scorer, answers, reply, value):
    found = with_baselines(scorer, ["?"] * len(answers), refer(answers))["constant"]
    assert (found["reply"], found["accuracy"]) == (reply, pytest.approx(value))


def test_two_questions_about_an_image_stay_together():
    references = [Reference(f"{n}{a}", (a,), ("color",), f"p{n}") for n in range(700) for a in ("yes", "no")]
    found = with_baselines(mme, ["Yes"] * 1400, references)["constant"]
    assert found["types"]["color"]["accuracy"] == 0.5


def test_a_reply_may_state_several_facts():
    references = [Reference(f"q{n}", ("red", "two"), (), f"p{n}") for n in range(3)]
    assert with_baselines(facts, [""] * 3, references)["constant"]["facts"] == 1


def test_the_reply_is_from_the_training_set_if_there_is_one():
    found = with_baselines(exact, ["x", "y"], refer(["red", "red"]), refer(["blue", "blue", "red"]))["constant"]
    assert found["reply"] == "red"
    assert with_baselines(exact, ["x", "y"], refer(["red", "red"]), refer(["blue"]))["constant"]["accuracy"] == 0


def test_each_type_has_its_constant_reply():
    colors, counts = refer(["red", "blue", "red"] * 4, "color"), refer(["2", "2", "3"] * 4, "count")
    found = with_baselines(exact, ["red"] * 24, [*colors, *counts])["constant"]
    assert (found["replies"], found["accuracy"]) == ({"color": "red", "count": "2"}, pytest.approx(2 / 3))
    assert {name: row["accuracy"] for name, row in found["types"].items()} == pytest.approx(
        {"color": 2 / 3, "count": 2 / 3}
    )
    assert "reply" not in found
    few = with_baselines(exact, ["red"] * 15, [*colors, *counts[:3]])["constant"]
    assert few["reply"] == "red", "too few answers of a type to learn a reply from"
    learned = with_baselines(exact, ["?"] * 6, [*colors[:3], *counts[:3]], [*colors, *counts[2::3] * 4])["constant"]
    assert learned["replies"] == {"color": "red", "count": "3"}


def test_no_replies_by_type_are_worse_than_one_to_all():
    """CIDEr-D of all weighs words by how rare they are among all, not within a type."""
    by_type = {"a": "eba cee bee ecd cee bee ecd bee cee eba", "b": "bee aec aec eba cee ecd bee eba bee ecd"}
    references = [one for kind, texts in by_type.items() for one in refer(list(map(" ".join, texts.split())), kind)]
    found = with_baselines(captions, [""] * 20, references)["constant"]
    assert found["reply"] == "b e e"
    assert found["cider_d"] > captions(["c e e"] * 10 + ["b e e"] * 10, references).all["cider_d"]  # type: ignore[operator]


def test_questions_without_a_type_have_a_row_beside_others():
    references = [*refer(["a"]), *(Reference(f"n{n}", ("b",)) for n in range(2))]
    scores = exact(["a", "b", "?"], references)
    assert list(scores.types) == ["kind", UNTYPED] and scores.types[UNTYPED]["accuracy"] == 0.5
    assert exact(["b", "?"], references[1:]).types == {}
    found = with_baselines(exact, ["?"] * 11, [Reference(f"n{n}", ("b",)) for n in range(11)])["constant"]
    assert found["replies"] == {UNTYPED: "b"}


def test_missing_replies_are_no_replies():
    assert variety([None, "a", None, "A."]) == {"distinct": 1, "commonest": "a", "commonest_share": 0.5}
    assert variety([None]) == {"distinct": 0, "commonest": "", "commonest_share": 0}


def test_the_gain_is_of_the_same_questions():
    references = refer(list("abcd"))
    replies = ["a", "b", "A.", None]
    found = blind_scores(exact, references, replies, {0: "a", 2: "a", 3: "d"})
    row = {"accuracy": 2 / 3, "questions": 3, "seen": 1 / 3, "gain": -1 / 3}
    assert {name: found[name] for name in row} == pytest.approx(row) == found["types"]["kind"]
    assert found["unchanged"] == pytest.approx(2 / 3)
    summary = {**exact(replies, references).as_json(), **with_baselines(exact, replies, references, blind={1: "?"})}
    assert [line.split() for line in table(summary).splitlines()] == [
        ["questions", "accuracy", "blind", "constant", "gain"],
        ["all", "4", "50.00%", "0.00%", "25.00%", "+100.00%"],
        ["kind", "4", "50.00%", "0.00%", "25.00%", "+100.00%"],
    ]
    assert "blind" not in with_baselines(exact, replies, references, blind={})
