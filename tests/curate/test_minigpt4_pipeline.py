"""MiniGPT-4's curation as a whole: what each step does to a sample, and how the report counts it."""

import json
import time

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.curate.client import Client
from mmlab.curate.curation_report import minigpt4_lines
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.journal import step_rows
from mmlab.curate.minigpt4_pipeline import draw_images, reviewed_images
from mmlab.curate.minigpt4_steps import repair
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from tests.curate.scripted_endpoint import ScriptedEndpoint, always
from tests.curate.tiny_curation import (
    SAID,
    Scripted,
    answer,
    colour,
    endpoint,
    make_images,
    records,
    run,
    tiny_endpoint,
)
from tests.tiny_shapes import make_records


@pytest.fixture
def server():
    with endpoint() as running:
        yield running


@pytest.fixture
def index(tmp_path):
    return make_images(tmp_path / "pictures")


def test_steps_of_each_sample(tmp_path, server, index):
    describer = Scripted()
    counts = run(index, server, tmp_path / "out", describer)
    assert describer.batches == [3, 3, 1, 1, 3, 1], "all described, then the short ones of each batch continued"
    texts = {row["key"]: row["text"] for row in step_rows(tmp_path / "out", "continued")}
    assert texts["s0000"] == SAID[0], "11 tokens are more than 10"
    assert texts["s0002"] == "a dog and a ball." and texts["s0004"] == "" and texts["s0003"] == "a cat ###"
    caught = {row["key"]: row["caught"] for row in step_rows(tmp_path / "out", "filtered")}
    assert caught == {
        "s0000": ["repeats", "unfinished"],
        "s0001": [],
        "s0002": [],
        "s0003": ["symbols"],
        "s0004": ["empty"],
        "s0005": ["apology"],
        "s0006": [],
    }
    written = records(tmp_path / "out")
    assert {key: record["caption"] for key, record in written.items()} == {
        "s0001": SAID[1],
        "s0002": "A dog and a ball.",
        "s0006": "A dog and a ball.",
    }
    assert written["s0002"]["provenance"] == {
        "recipe": "minigpt4",
        "data": index.hash,
        "described": "a dog and",
        "continued": "a dog and a ball.",
        "repaired": "A dog and a ball.",
        "repaired_by": "m-0613",
        "unrepaired": None,
        "review": None,
        "reviewed_at": None,
    }
    assert written["s0001"]["provenance"]["continued"] is written["s0001"]["provenance"]["repaired"] is None
    assert ShardIndex.open(tmp_path / "out" / "shards").read(0)["png"] == colour(1)
    assert counts["filtered"]["rules"] == {"unfinished": 1, "repeats": 1, "empty": 1, "symbols": 1, "apology": 1}
    assert counts["written"]["samples"] == 3 and counts == json.loads((tmp_path / "out" / "report.json").read_text())


def test_equal_texts_are_billed_once_and_empty_ones_not_at_all(tmp_path, server, index):
    counts = run(index, server, tmp_path / "out", llm={"workers": 3, "prompt_price": 1e6, "completion_price": 2e6})
    assert max(server.paid.values()) == 1 and len(server.paid) == 5
    words = sum(len(prompt.split()) for prompt in server.paid)
    answered = sum(len(answer(prompt).split()) for prompt in server.paid)
    repaired = counts["repaired"]
    assert (repaired["replies"], repaired["prompt_tokens"], repaired["completion_tokens"]) == (5, words, answered)
    assert repaired["cost"] == words + 2 * answered
    assert (repaired["changed"], repaired["unchanged"]) == (3, 4)
    lines = minigpt4_lines(counts)
    assert "5 replies" in lines[3] and "repeats 1" in lines[4] and lines[-1].endswith("3 samples")


def test_a_second_command_repeats_nothing(tmp_path, server, index):
    first = run(index, server, tmp_path / "out")
    describer, asked = Scripted(), len(server.asked)
    assert run(index, server, tmp_path / "out", describer) == first
    assert describer.batches == [] and len(server.asked) == asked


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"continue_up_to": 5}, "continued.jsonl was written with continue_up_to=10, not 5; use another out"),
        ({"instruction": "Why?"}, "described.jsonl was written with instruction=What is it?, not Why?"),
        ({"rules": ["empty"]}, "filtered.jsonl was written with rules="),
        ({"seed": 1}, "described.jsonl was written with seed=0, not 1"),
    ],
)
def test_other_settings_need_another_folder(tmp_path, server, index, changes, says):
    run(index, server, tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        run(index, server, tmp_path / "out", **changes)
    assert says in str(caught.value)


def test_other_rules_cost_nothing(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    (tmp_path / "out" / "filtered.jsonl").unlink()
    asked = len(server.asked)
    assert run(index, server, tmp_path / "out", rules=["empty"])["written"]["samples"] == 6
    assert len(server.asked) == asked


@pytest.mark.parametrize("act", ["429", "500", "garbage", "empty", "drop"])
def test_an_endpoint_that_recovers(tmp_path, index, act):
    with ScriptedEndpoint(always(act, "ok"), answer=answer) as server:
        counts = run(index, server, tmp_path / "out")
    assert counts["written"]["samples"] == 3 and sum(counts["repaired"]["retries"].values()) == 5


def test_a_sample_without_a_reply_is_named_and_requested_again(tmp_path, index):
    broken = True

    def script(prompt, attempt):
        return "400" if broken and "cat" in prompt else "ok"

    with ScriptedEndpoint(script, answer=answer) as server:
        with pytest.raises(RunError, match=r"1 of 7 descriptions were not repaired \(400 1\), the first is s0003: "):
            run(index, server, tmp_path / "out")
        assert len(step_rows(tmp_path / "out", "repaired")) == 6
        broken = False
        assert run(index, server, tmp_path / "out")["written"]["samples"] == 3
        assert max(server.paid.values()) == 1


@pytest.mark.parametrize(("unrepaired", "rows", "note"), [("keep", 7, "400"), ("drop", 6, None)])
def test_a_sample_without_a_reply_can_be_kept_or_dropped(tmp_path, index, unrepaired, rows, note):
    with ScriptedEndpoint(lambda prompt, _: "400" if "lamp" in prompt else "ok", answer=answer) as server:
        counts = run(index, server, tmp_path / "out", unrepaired=unrepaired)
    assert counts["repaired"]["changed"] + counts["repaired"]["unchanged"] == rows
    assert counts["repaired"]["faults"] == ({} if note else {"not repaired: 400": 1})
    found = records(tmp_path / "out").get("s0001")
    assert (found and found["provenance"]["unrepaired"]) == note


@pytest.fixture
def many(tmp_path):
    """Eight images; all texts but the last one's are short or odd."""
    return make_records(tmp_path / "many", [{}] * 8, [colour(i) for i in (0, 2, 3, 5, 6, 2, 3, 1)])


def unless_lamp(act: str):
    return lambda prompt, attempt: "ok" if "lamp" in prompt else act


@pytest.mark.parametrize("unrepaired", ["keep", "drop"])
@pytest.mark.parametrize("act", ["400", "cut", "filtered", "empty"])
def test_many_failed_repairs_do_not_stop_the_run(tmp_path, many, act, unrepaired):
    out = tmp_path / "out"
    with ScriptedEndpoint(unless_lamp(act), answer=answer) as server:
        changes = {"unrepaired": unrepaired, "rules": [], "llm": {"prompt_price": 1e6, "completion_price": 1e6}}
        counts = run(many, server, out, **changes)
        assert counts["written"]["samples"] == (8 if unrepaired == "keep" else 1)
        assert counts["repaired"]["unrepaired"] == (7 if unrepaired == "keep" else 0)
        assert sum(counts["repaired"]["faults"].values()) == (7 if unrepaired == "drop" else 0)
        assert counts["repaired"]["cost"] == server.tokens, "unusable replies are billed as well"
        assert run(many, server, out, **changes) == counts
    kept = records(out)
    assert all(record["provenance"]["repaired_by"] is None for key, record in kept.items() if key != "s0007")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("400", "the same command retries; unrepaired=keep or drop continues without them"),
        (
            "cut",
            "stays so unless settings change, such as to a larger llm.settings.max_tokens; unrepaired=keep",
        ),
        ("empty", "was empty in every attempt; a stored reply that is cut off, filtered or empty stays so"),
    ],
)
def test_ways_out_are_named_and_nothing_is_billed_again(tmp_path, many, act, says):
    with ScriptedEndpoint(unless_lamp(act), answer=answer) as server:
        for _ in range(2):
            with pytest.raises(RunError) as caught:
                run(many, server, tmp_path / "out")
            message = str(caught.value)
            assert message.partition(" descriptions were not repaired")[0] in ("7 of 8", "7 of 7") and says in message
            assert ("the same command retries" in message) == (act == "400")
        # Seven rows with four different texts, and the one with a reply.
        assert len(server.asked) == {"400": 2 * 7 + 1, "cut": 4 + 1, "empty": 2 * 4 + 1}[act]


def test_stored_replies_say_nothing_about_the_endpoint(tmp_path, many):
    """Stored replies that were cut off come between requests that a dead endpoint does not answer."""
    with (
        ScriptedEndpoint(lambda prompt, _: "cut" if "ball" in prompt else "400", answer=answer) as server,
        pytest.raises(RunError, match=r"not repaired .*; the same command retries 5 of them; a stored reply that"),
    ):
        run(many, server, tmp_path / "out", llm={"workers": 1})
    with (
        ScriptedEndpoint(lambda prompt, _: "500", answer=answer) as down,
        pytest.raises(RunError, match="5 requests in a row failed"),
    ):
        run(many, down, tmp_path / "out", llm={"workers": 1}, unrepaired="keep")


def test_an_end_cancels_waiting_requests(tmp_path):
    """Ctrl-C, or an error elsewhere, cancels requests that wait between two attempts."""
    rows = [{"key": str(i), "sample": i, "text": text} for i, text in enumerate(("a dog", "a cat", "a cow"))]
    script = unless_lamp("503")
    with ScriptedEndpoint(lambda prompt, n: "ok" if "dog" in prompt else script(prompt, n)) as half:
        config = tiny_endpoint(half, attempts=6, backoff=30.0, workers=3)
        repaired = repair(rows, Client(config, Endpoint(config), tmp_path), "Mend this.", "retry")
        assert next(repaired)["key"] == "0"
        half.wait_for(3)
        start = time.monotonic()
        repaired.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 10 and len(half.asked) == 3


def test_an_endpoint_that_is_down_stops_the_run(tmp_path, server):
    index = make_records(tmp_path / "many", [{}] * 12, [colour(i % 4) for i in range(12)])
    with (
        ScriptedEndpoint(always("500")) as down,
        pytest.raises(RunError, match=r"5 requests in a row failed, the last for s00\d\d: no reply from .* 500 \(2x\)"),
    ):
        run(index, down, tmp_path / "out", unrepaired="keep", llm={"workers": 1})
    assert len(set(down.asked)) <= 4 and step_rows(tmp_path / "out", "repaired") == []
    run(index, server, tmp_path / "out")
    assert len(step_rows(tmp_path / "out", "repaired")) == 12


def test_an_unreadable_image_is_named(tmp_path, server):
    index = make_records(tmp_path / "p", [{}] * 3, [colour(1), b"\x89PNG\r\n\x1a\nbroken", colour(2)])
    counts = run(index, server, tmp_path / "out")
    assert counts["described"]["samples"] == counts["written"]["samples"] == 2
    ((fault, number),) = counts["described"]["faults"].items()
    assert number == 1 and fault.startswith("unreadable image (14 bytes)") and "1 left" in minigpt4_lines(counts)[0]


def test_the_draw(tmp_path):
    index = make_records(tmp_path / "p", [{}] * 9, [colour(1), None] * 4 + [colour(2)])
    assert draw_images(index, 100, 0) == [0, 2, 4, 6, 8]
    draws = {seed: draw_images(index, 3, seed) for seed in range(9)}
    assert all(len(set(drawn)) == 3 and drawn == sorted(drawn) for drawn in draws.values())
    assert len({tuple(drawn) for drawn in draws.values()}) > 3 and draws[4] == draw_images(index, 3, 4)
    assert set(draw_images(index, 2, 1)) < set(draw_images(index, 4, 1)), "a larger draw contains the smaller one"


def test_mistakes_are_one_sentence(tmp_path, server):
    with pytest.raises(ConfigError, match="no rule 'repeat'"):
        run(make_images(tmp_path / "p", 1), server, tmp_path, rules=["repeat"])
    with pytest.raises(ConfigError, match="There is no curation in"):
        reviewed_images(tmp_path)
    texts = make_records(tmp_path / "texts", [{}], [None])
    with pytest.raises(DataError, match="contains no image"):
        run(texts, server, tmp_path / "out")
    bad = make_records(tmp_path / "bad", [{}], [colour(4)])
    with pytest.raises(DataError, match=r"all descriptions in .* were rejected"):
        run(bad, server, tmp_path / "other")


def test_other_images_are_refused_and_not_reviewed(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    other = make_records(tmp_path / "other", [{}] * 7, [colour(6 - i) for i in range(7)])
    with pytest.raises(ConfigError, match=r"described\.jsonl was written with data="):
        run(other, server, tmp_path / "out")
    assert reviewed_images(tmp_path / "out").root == index.root
    (tmp_path / "out" / "data.json").write_text(json.dumps({"data": str(other.root), "hash": other.hash}))
    with pytest.raises(DataError, match="has changed since"):
        reviewed_images(tmp_path / "out")


def test_the_images_have_to_stay(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    assert reviewed_images(tmp_path / "out").hash == index.hash
    with ShardWriter(index.root, 8, overwrite=True, quiet=True) as writer:
        writer.write("other", {"png": colour(3), "json": {}})
    with pytest.raises(DataError, match="has changed since"):
        reviewed_images(tmp_path / "out")
