"""Decisions are saved at once, undone in order, and never overwritten by a tab with an old state."""

import json
import threading

import pytest

from mmlab.config.errors import RunError
from mmlab.curate.decisions import Review, Stale, Unfit, items_to_review
from mmlab.curate.journal import read_rows
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import ScriptedEndpoint, always
from tests.curate.tiny_curation import SAID, answer, catch, decide, endpoint, make_images, records, run


@pytest.fixture
def server():
    with endpoint() as running:
        yield running


@pytest.fixture
def work(tmp_path, server):
    """A curation whose three descriptions wait for a person, and a function that continues it."""
    index = make_images(tmp_path / "pictures")

    def resume(review="all", **changes):
        return run(index, server, tmp_path / "out", review=review, **changes)

    assert resume()["written"] is None
    return tmp_path / "out", resume


def test_decisions_reach_the_shards(work):
    out, resume = work
    review = Review(out)
    assert [item["key"] for item in review.items] == ["s0001", "s0002", "s0006"]
    decide(review, 0, "accept", "", 0)
    decide(review, 1, "edit", "  A dog \n and a round ball. ", 0)
    assert resume()["written"] is None and not (out / "shards").exists(), "one is undecided"
    decide(review, 2, "reject", "", 0)
    counts = resume()
    assert counts["reviewed"] == {"accepted": 1, "edited": 1, "rejected": 1, "left": 0}
    written = records(out)
    assert {key: record["caption"] for key, record in written.items()} == {
        "s0001": SAID[1],
        "s0002": "A dog\nand a round ball.",
    }
    provenance = written["s0002"]["provenance"]
    assert provenance["review"] == "edit" and provenance["repaired"] == "A dog and a ball."
    assert provenance["reviewed_at"].startswith("20")


def test_decided_texts_can_be_written_before_the_rest(work):
    out, resume = work
    decide(Review(out), 1, "accept", "", 0)
    assert resume("decided")["written"]["samples"] == 1 and list(records(out)) == ["s0002"]
    assert resume("none")["written"]["samples"] == 3
    assert records(out)["s0002"]["provenance"]["review"] is None


def test_undo_one_by_one_and_after_a_restart(work):
    out, _ = work
    review = Review(out)
    decide(review, 0, "accept", "", 0)
    decide(review, 1, "reject", "", 0)
    decide(review, 0, "edit", "A blue square.", 1)
    assert review.state()["letters"] == "er-" and review.item(0)["text"] == "A blue square."
    assert review.undo(3) == 0 and review.state()["letters"] == "ar-" and review.item(0)["text"] == SAID[1]
    review = Review(out)
    assert review.state() == {
        **{"total": 3, "last": 2, "letters": "ar-", "accepted": 1, "edited": 0, "rejected": 1, "left": 1}
    }
    assert review.undo(2) == 1 and review.undo(1) == 0
    assert review.state()["letters"] == "---" and review.state()["last"] == 0
    with pytest.raises(Stale):
        review.undo(0)
    assert len(read_rows(out / "decisions.jsonl")) == 6, "the log only grows"


def test_a_tab_with_an_old_state_changes_nothing(work):
    review = Review(work[0])
    decide(review, 0, "accept", "", 0)
    for action, seen in (("reject", 0), ("accept", 0), ("edit", 7)):
        with pytest.raises(Stale):
            decide(review, 0, action, "other", seen)
    with pytest.raises(Stale):
        review.undo(5)
    decide(review, 0, "reject", "", 1)
    assert review.state()["letters"] == "r--" and review.item(0)["seen"] == 2


def test_a_tab_that_outlives_a_curation_changes_nothing(work):
    out, _ = work
    shown = Review(out).item(0)
    catch(out, "s0001")
    review = Review(out)
    assert review.item(0)["key"] == "s0002" and shown["next"] == "s0002" and review.item(1)["next"] is None
    with pytest.raises(Stale):
        review.decide(0, "accept", "", shown["key"], shown["proposed"], 0)
    with pytest.raises(Stale):
        review.decide(0, "accept", "", "s0002", "A dog and another ball.", 0)
    assert read_rows(out / "decisions.jsonl") == []


@pytest.mark.parametrize("i", [-1, 3])
def test_items_that_do_not_exist(work, i):
    review = Review(work[0])
    last = review.item(2)
    with pytest.raises(Unfit, match="There is no description"):
        review.decide(i, "accept", "", last["key"], last["proposed"], 0)
    assert review.state()["letters"] == "---"


def test_tabs_at_once_make_one_decision(work):
    out, _ = work
    review, stale = Review(out), []
    gate = threading.Barrier(8)

    def tab(n: int) -> None:
        gate.wait()
        try:
            decide(review, n % 2, "edit", f"text of {n}.", 0)
        except Stale:
            stale.append(n)

    threads = [threading.Thread(target=tab, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = read_rows(out / "decisions.jsonl")
    assert (
        len(stale) == 6 and [row["n"] for row in rows] == [1, 2] and {row["key"] for row in rows} == {"s0001", "s0002"}
    )


@pytest.mark.parametrize(("action", "text"), [("edit", " \n"), ("edit", "x" * 20_001), ("delete", ""), ("undo", "")])
def test_invalid_decisions_are_refused(work, action, text):
    out, _ = work
    with pytest.raises(Unfit):
        decide(Review(out), 0, action, text, 0)
    assert read_rows(out / "decisions.jsonl") == []


def test_an_edit_without_a_change_is_an_acceptance(work):
    review = Review(work[0])
    decide(review, 0, "edit", f" {SAID[1]}\n", 0)
    assert review.state()["letters"] == "a--"


def test_decisions_belong_to_a_text(work):
    """A description whose text has changed is undecided again."""
    out, _ = work
    review = Review(out)
    for i in range(3):
        decide(review, i, "accept", "", 0)
    for name in ("repaired", "filtered"):
        (out / f"{name}.jsonl").unlink()
    with ScriptedEndpoint(answer=lambda prompt: answer(prompt).replace("lamp", "lantern")) as other:
        index = ShardIndex.open(json.loads((out / "data.json").read_text())["data"])
        counts = run(index, other, out, review="all", repair="Mend it well.")
    assert counts["reviewed"]["left"] == 1 and counts["written"] is None
    assert Review(out).state()["letters"] == "-aa"


def test_nothing_to_review_yet(tmp_path):
    with pytest.raises(RunError, match="nothing to review yet"):
        items_to_review(tmp_path)
    index = make_images(tmp_path / "pictures")
    with ScriptedEndpoint(always("400")) as server, pytest.raises(RunError, match=r"in a row failed|not repaired"):
        run(index, server, tmp_path / "out", review="all")
    with pytest.raises(RunError, match="nothing to review yet"):
        items_to_review(tmp_path / "out")
