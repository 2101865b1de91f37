"""The curation as a whole: what each step does to a sample, and what the report says of it."""

import json
import time

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.minigpt4 import repair
from mmlab.curate.pipeline import choose, data_of
from mmlab.curate.report import lines
from mmlab.curate.steps import step_rows
from mmlab.data.index import ShardIndex
from mmlab.data.shards import ShardWriter
from tests.curate.scripted_endpoint import ScriptedEndpoint, always
from tests.curate.tiny_curation import SAID, Scripted, answer, colour, make_pictures, recipe, run
from tests.tiny_shapes import make_records


@pytest.fixture
def server():
    with ScriptedEndpoint(answer=answer) as running:
        yield running


@pytest.fixture
def index(tmp_path):
    return make_pictures(tmp_path / "pictures")


def records(out) -> dict[str, dict]:
    shards = ShardIndex.open(out / "shards")
    return {str(shards.keys[i]): json.loads(shards.read(i)["json"]) for i in range(len(shards))}


def test_what_becomes_of_each_sample(tmp_path, server, index):
    describer = Scripted()
    counts = run(index, server, tmp_path / "out", describer)
    assert describer.batches == [3, 3, 1, 1, 3, 1], "described, then the short ones of the same batches"
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


def test_alike_texts_are_paid_for_once_and_an_empty_one_not_at_all(tmp_path, server, index):
    counts = run(index, server, tmp_path / "out", workers=3, prices=(1e6, 2e6))
    assert max(server.paid.values()) == 1 and len(server.paid) == 5
    words = sum(len(prompt.split()) for prompt in server.paid)
    answered = sum(len(answer(prompt).split()) for prompt in server.paid)
    repaired = counts["repaired"]
    assert (repaired["replies"], repaired["prompt_tokens"], repaired["completion_tokens"]) == (5, words, answered)
    assert repaired["cost"] == words + 2 * answered
    assert (repaired["changed"], repaired["unchanged"]) == (3, 4)
    assert (
        "5 replies" in lines(counts)[3] and "repeats 1" in lines(counts)[4] and lines(counts)[-1].endswith("3 samples")
    )


def test_a_second_command_does_nothing_again(tmp_path, server, index):
    first = run(index, server, tmp_path / "out")
    describer, asked = Scripted(), len(server.asked)
    assert run(index, server, tmp_path / "out", describer) == first
    assert describer.batches == [] and len(server.asked) == asked


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"continue_up_to": 5}, "continued.jsonl was made with continue_up_to=10, not 5; give another out"),
        ({"instruction": "Why?"}, "described.jsonl was made with instruction=What is it?, not Why?"),
        ({"rules": ["empty"]}, "filtered.jsonl was made with rules="),
        ({"seed": 1}, "described.jsonl was made with seed=0, not 1"),
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
def test_an_endpoint_that_recovers_loses_no_sample(tmp_path, index, act):
    with ScriptedEndpoint(always(act, "ok"), answer=answer) as server:
        counts = run(index, server, tmp_path / "out")
    assert counts["written"]["samples"] == 3 and sum(counts["repaired"]["retries"].values()) == 5


def test_a_sample_without_an_answer_is_named_and_asked_for_again(tmp_path, index):
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
def test_a_sample_without_an_answer_can_be_kept_or_dropped(tmp_path, index, unrepaired, rows, note):
    with ScriptedEndpoint(lambda prompt, _: "400" if "lamp" in prompt else "ok", answer=answer) as server:
        counts = run(index, server, tmp_path / "out", unrepaired=unrepaired)
    assert counts["repaired"]["changed"] + counts["repaired"]["unchanged"] == rows
    assert counts["repaired"]["faults"] == ({} if note else {"not repaired: 400": 1})
    found = records(tmp_path / "out").get("s0001")
    assert (found and found["provenance"]["unrepaired"]) == note


@pytest.fixture
def many(tmp_path):
    """Eight pictures; all texts but the last one's are short or odd."""
    return make_records(tmp_path / "many", [{}] * 8, [colour(i) for i in (0, 2, 3, 5, 6, 2, 3, 1)])


def unless_lamp(act: str):
    return lambda prompt, attempt: "ok" if "lamp" in prompt else act


@pytest.mark.parametrize("unrepaired", ["keep", "drop"])
@pytest.mark.parametrize("act", ["400", "cut", "filtered", "empty"])
def test_many_texts_that_cannot_be_repaired_do_not_stop_the_run(tmp_path, many, act, unrepaired):
    out = tmp_path / "out"
    with ScriptedEndpoint(unless_lamp(act), answer=answer) as server:
        counts = run(many, server, out, unrepaired=unrepaired, rules=[], prices=(1e6, 1e6))
        assert counts["written"]["samples"] == (8 if unrepaired == "keep" else 1)
        assert counts["repaired"]["unrepaired"] == (7 if unrepaired == "keep" else 0)
        assert sum(counts["repaired"]["faults"].values()) == (7 if unrepaired == "drop" else 0)
        assert counts["repaired"]["cost"] == server.tokens, "what could not be used was paid for as well"
        assert run(many, server, out, unrepaired=unrepaired, rules=[], prices=(1e6, 1e6)) == counts
        assert counts["repaired"]["cost"] == server.tokens
    kept = records(out)
    assert all(record["provenance"]["repaired_by"] is None for key, record in kept.items() if key != "s0007")


@pytest.mark.parametrize(
    ("act", "says"),
    [
        ("400", "the same command asks again; unrepaired=keep or drop goes on"),
        (
            "cut",
            "stays as it is; other settings ask anew, such as a larger llm.settings.max_tokens; unrepaired=keep or",
        ),
        ("empty", "was empty in every attempt; an answer that is cut off, filtered or empty stays as it is"),
    ],
)
def test_what_helps_is_named_and_nothing_is_paid_again(tmp_path, many, act, says):
    with ScriptedEndpoint(unless_lamp(act), answer=answer) as server:
        for _ in range(2):
            with pytest.raises(RunError) as caught:
                run(many, server, tmp_path / "out")
            said = str(caught.value)
            assert said.partition(" descriptions were not repaired")[0] in ("7 of 8", "7 of 7") and says in said
            assert ("the same command asks again" in said) == (act == "400")
        # Seven rows of four texts, and the one that is answered.
        assert len(server.asked) == {"400": 2 * 7 + 1, "cut": 4 + 1, "empty": 2 * 4 + 1}[act]


def test_what_came_from_the_disk_says_nothing_of_the_endpoint(tmp_path, many):
    """Cut answers that are kept lie between those that a dead endpoint does not give."""
    with (
        ScriptedEndpoint(lambda prompt, _: "cut" if "ball" in prompt else "400", answer=answer) as server,
        pytest.raises(RunError, match=r"not repaired .*; the same command asks again for 5 of them; an answer that"),
    ):
        run(many, server, tmp_path / "out", workers=1)
    with (
        ScriptedEndpoint(lambda prompt, _: "500", answer=answer) as down,
        pytest.raises(RunError, match="5 in a row got no answer"),
    ):
        run(many, down, tmp_path / "out", workers=1, unrepaired="keep")


def test_nobody_waits_for_attempts_after_an_end(server):
    """Ctrl-C, or an error elsewhere, ends the questions that rest between two attempts."""
    rows = [{"key": str(i), "sample": i, "text": text} for i, text in enumerate(("a dog", "a cat", "a cow"))]
    script = unless_lamp("503")
    with ScriptedEndpoint(lambda prompt, n: "ok" if "dog" in prompt else script(prompt, n)) as half:
        backend = Endpoint(half.url, "m", variable=None, backoff=30.0)
        answers = repair(rows, lambda messages, stop: backend.complete(messages, stop), "Mend this.", workers=3)
        assert next(answers)["key"] == "0"
        half.wait_for(3)
        start = time.monotonic()
        answers.close()  # type: ignore[attr-defined]
        assert time.monotonic() - start < 10 and len(half.asked) == 3


def test_an_endpoint_that_is_down_stops_the_run(tmp_path, server):
    index = make_records(tmp_path / "many", [{}] * 12, [colour(i % 4) for i in range(12)])
    with (
        ScriptedEndpoint(always("500")) as down,
        pytest.raises(RunError, match=r"5 in a row got no answer, now s00\d\d: no reply from .* 500 \(2x\)"),
    ):
        run(index, down, tmp_path / "out", unrepaired="keep", workers=1)
    assert len(set(down.asked)) <= 4 and step_rows(tmp_path / "out", "repaired") == []
    run(index, server, tmp_path / "out")
    assert len(step_rows(tmp_path / "out", "repaired")) == 12


def test_a_picture_that_cannot_be_read_is_named(tmp_path, server):
    index = make_records(tmp_path / "p", [{}] * 3, [colour(1), b"\x89PNG\r\n\x1a\nbroken", colour(2)])
    counts = run(index, server, tmp_path / "out")
    assert counts["described"]["samples"] == counts["written"]["samples"] == 2
    ((fault, number),) = counts["described"]["faults"].items()
    assert number == 1 and fault.startswith("unreadable picture (14 bytes)") and "1 left out" in lines(counts)[0]


def test_the_draw(tmp_path):
    index = make_records(tmp_path / "p", [{}] * 9, [colour(1), None] * 4 + [colour(2)])
    assert choose(index, 100, 0) == [0, 2, 4, 6, 8]
    draws = {seed: choose(index, 3, seed) for seed in range(9)}
    assert all(len(set(drawn)) == 3 and drawn == sorted(drawn) for drawn in draws.values())
    assert len({tuple(drawn) for drawn in draws.values()}) > 3 and draws[4] == choose(index, 3, 4)
    assert set(choose(index, 2, 1)) < set(choose(index, 4, 1)), "more samples are the same and others"


def test_mistakes_are_one_sentence(tmp_path, server):
    with pytest.raises(ConfigError, match="no rule 'repeat'"):
        recipe(rules=["repeat"])
    with pytest.raises(ConfigError, match="There is no curation in"):
        data_of(tmp_path)
    texts = make_records(tmp_path / "texts", [{}], [None])
    with pytest.raises(DataError, match="holds no picture"):
        run(texts, server, tmp_path / "out")
    bad = make_records(tmp_path / "bad", [{}], [colour(4)])
    with pytest.raises(DataError, match=r"no description of .* is left to write"):
        run(bad, server, tmp_path / "other")


def test_other_pictures_are_refused_and_not_reviewed(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    other = make_records(tmp_path / "other", [{}] * 7, [colour(6 - i) for i in range(7)])
    with pytest.raises(ConfigError, match=r"described\.jsonl was made with data="):
        run(other, server, tmp_path / "out")
    assert data_of(tmp_path / "out").root == index.root
    (tmp_path / "out" / "data.json").write_text(json.dumps({"data": str(other.root), "hash": other.hash}))
    with pytest.raises(DataError, match="is not what it was when"):
        data_of(tmp_path / "out")


def test_the_pictures_have_to_stay(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    assert data_of(tmp_path / "out").hash == index.hash
    with ShardWriter(index.root, 8, overwrite=True, quiet=True) as writer:
        writer.write("other", {"png": colour(3), "json": {}})
    with pytest.raises(DataError, match="is not what it was when"):
        data_of(tmp_path / "out")
