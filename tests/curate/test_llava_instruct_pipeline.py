"""LLaVA's curation as a whole: what each step does to a question, and how the report counts it."""

import json
from dataclasses import fields

import pytest

from mmlab.config.errors import ConfigError, DataError, RunError
from mmlab.curate.config import InstructDataConfig, InstructPromptsConfig, InstructSamplesConfig
from mmlab.curate.curation_report import instruct_lines
from mmlab.curate.journal import step_rows
from mmlab.curate.llava_instruct_pipeline import ENTRIES, open_images
from mmlab.curate.llava_instruct_prompts import Example, FewShotPrompt
from mmlab.curate.rules import RULES
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import ScriptedEndpoint
from tests.curate.tiny_curation import colour, records
from tests.curate.tiny_instruct import THINGS, adds_up, answer, endpoint, make_images, run, settings, thing_of
from tests.tiny_shapes import make_records

ONLY_REASONING = InstructSamplesConfig(0, 0, 9)
PRICES = {"prompt_price": 1e6, "completion_price": 2e6}


@pytest.fixture
def server():
    with endpoint() as running:
        yield running


@pytest.fixture
def index(tmp_path):
    return make_images(tmp_path / "pictures", blind=5)


def test_steps_of_each_question(tmp_path, server, index):
    out = tmp_path / "out"
    counts = run(index, server, out)
    assert adds_up(counts) and counts == json.loads((out / "report.json").read_text())
    assert len(server.asked) == 18 and counts["total"]["chosen"] == 18
    talk, detail, why = (counts["types"][kind] for kind in RESPONSE_TYPES)
    assert (talk["kept"], talk["rules"], talk["turns"]) == (5, {"caption": 1}, 2)
    assert (detail["kept"], why["malformed"], why["kept"]) == (6, {"several questions": 1}, 5)
    assert counts["written"]["entries"] == 16 and counts["written"]["without_picture"] == 3
    entries = json.loads((out / ENTRIES).read_text())
    written = records(out)
    assert len(written) == 13 and {name: record["type"] for name, record in written.items()} == {
        name: name.split("-")[1] for name in written
    }
    shards = ShardIndex.open(out / "shards")
    assert [shards.type_of(i) for i in range(13)] == [record["type"] for record in written.values()]
    assert shards.read(0)["png"] == colour(0) and "s0005-conversation" not in written
    assert [entry for entry in entries if entry["image"] != "sofa.jpg"] == [
        {name: value for name, value in record.items() if name != "provenance"} for record in written.values()
    ]
    origin = written["s0000-conversation"]["provenance"]
    assert origin["recipe"] == "llava_instruct" and origin["data"] == index.hash and origin["model"] == "m-0613"
    (stored,) = (out / "replies").glob(f"*/{origin['reply']}.json")
    assert json.loads(stored.read_text())["reply"]["text"] == answer("conversation\ncat")


def test_entries_have_the_form_of_llavas(tmp_path, server, index):
    run(index, server, tmp_path / "out")
    entries = json.loads((tmp_path / "out" / ENTRIES).read_text())
    firsts = []
    for entry in entries:
        assert (
            list(entry) == ["id", "image", "type", "conversations"] and entry["image"] == f"{thing_of(str(entry))}.jpg"
        )
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        firsts.append(turns[0]["value"])
        assert sum(turn["value"].count("<image>") for turn in turns) == 1 == firsts[-1].count("<image>")
    sides = {text.startswith("<image>\n"): text.endswith("\n<image>") for text in firsts}
    assert sides == {True: False, False: True}, "before some questions and after others"
    asked = {
        text.replace("<image>", "").strip() for text, e in zip(firsts, entries, strict=True) if "detail" in e["type"]
    }
    assert asked == {"What is it?", "Describe it."}


def test_a_request_has_prompt_examples_and_image_in_words(tmp_path, server, index):
    prompts = {kind: FewShotPrompt(kind) for kind in RESPONSE_TYPES}
    examples = [Example("One.", "A one."), Example("Two.", "A two.")]
    prompts["detail_description"] = FewShotPrompt("detail_description", examples)
    run(index, server, tmp_path / "out", prompts, llm={"workers": 1})
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies[::6]]
    few = ["system", "user", "assistant", "user", "assistant", "user"]
    assert roles == [["system", "user"], few, ["system", "user"]]
    detail = [message["content"] for message in server.bodies[6]["messages"]]
    box = "cat: [0.1, 0.25, 0.5, 1.0]"
    assert detail == ["detail_description", "One.", "A one.", "Two.", "A two.", f"A cat.\nThe cat again.\n\n{box}"]


def good_bad_late_or_missing(prompt: str, attempt: int) -> str:
    """What happens to the questions about each thing."""
    acts = {
        "dog": ("500", "ok"),
        "cup": ("late",),
        "bus": ("garbage", "empty", "ok"),
        "kite": ("cut",),
        "sofa": ("drop", "ok"),
    }
    if thing_of(prompt) == "cat":
        return "hang" if prompt.startswith("conversation") else "ok"
    turns = acts[thing_of(prompt)]
    return turns[min(attempt, len(turns) - 1)]


def test_good_bad_late_and_missing_replies(tmp_path, index):
    with endpoint(good_bad_late_or_missing) as server:
        counts = run(index, server, tmp_path / "out", unanswered="drop", llm={"timeout": 0.4, "workers": 1})
    assert adds_up(counts) and counts["total"]["chosen"] == 18
    assert counts["total"]["unanswered"] == {"finish_reason length": 3, "empty answer": 3, "timeout": 1}
    assert counts["total"]["retries"] == {"500": 3, "garbage": 6, "empty answer": 3}
    assert set(server.paid.values()) == {1} and counts["total"]["replies"] == len(server.paid) == 17
    tokens = counts["total"]["prompt_tokens"] + counts["total"]["completion_tokens"]
    assert tokens == server.tokens, "unusable replies are billed as well"
    rows = step_rows(tmp_path / "out", "answered")
    assert len({row["key"] for row in rows}) == len(rows) == 18, "each row once"
    texts_of = {row["key"]: row["text"] for row in rows if "text" in row}
    for row in step_rows(tmp_path / "out", "parsed"):
        texts = [text for turn in row.get("turns", []) for text in turn]
        texts = texts[1:] if row["type"] == "detail_description" else texts
        assert all(text in texts_of[row["key"]] for text in texts), "nothing invented"
    text = "\n".join(instruct_lines(counts))
    parts = ("finish_reason length 3", "retries: garbage 6, 500 3, empty answer 3", "several questions 1")
    assert all(part in text for part in parts), text


def test_questions_without_a_reply_are_requested_again(tmp_path, index):
    down = True
    with endpoint(lambda prompt, _: "400" if down and "bus" in prompt else "ok") as server:
        with pytest.raises(RunError, match=r"3 of 18 questions got no reply \(400 3\).*unanswered=drop continues"):
            run(index, server, tmp_path / "out")
        assert not (tmp_path / "out" / ENTRIES).exists() and len(step_rows(tmp_path / "out", "answered")) == 15
        down = False
        counts = run(index, server, tmp_path / "out")
        assert adds_up(counts) and counts["total"]["answered"] == 18 and set(server.paid.values()) == {1}


def test_a_second_command_repeats_nothing(tmp_path, server, index):
    first = run(index, server, tmp_path / "out")
    assert run(index, server, tmp_path / "out") == first and len(server.asked) == 18


def test_equal_questions_are_billed_once(tmp_path, server):
    index = make_records(tmp_path / "p", [{"caption": "A cat."}] * 3, [colour(i) for i in range(3)])
    counts = run(index, server, tmp_path / "out", samples=ONLY_REASONING, llm=PRICES)
    assert len(server.asked) == 1 and counts["total"]["kept"] == 3 and adds_up(counts)
    words = len(answer("complex_reasoning\ncat").split())
    assert counts["total"]["cost"] == 3 + 2 * words and list(counts["types"]) == ["complex_reasoning"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "answered.jsonl was written with seed=0, not 1; use another out"),
        ({"prompts": InstructPromptsConfig("conversation", "x", "x")}, "with prompts.complex_reasoning="),
        ({"few_shot": {kind: FewShotPrompt(kind, [Example("a", "b")]) for kind in RESPONSE_TYPES}}, "with examples."),
        ({"requests": ["Why?"]}, "parsed.jsonl was written with requests="),
        ({"rules": []}, "filtered.jsonl was written with rules="),
    ],
)
def test_other_settings_need_another_folder(tmp_path, server, index, changes, says):
    run(index, server, tmp_path / "out")
    with pytest.raises(ConfigError) as caught:
        run(index, server, tmp_path / "out", **changes)
    assert says in str(caught.value) and len(server.asked) == 18


def test_other_rules_cost_nothing(tmp_path, server, index, monkeypatch):
    out = tmp_path / "out"
    run(index, server, out)
    (out / "filtered.jsonl").unlink()
    assert run(index, server, out, rules=[])["written"]["entries"] == 17
    (out / "filtered.jsonl").unlink()
    monkeypatch.setitem(RULES, "all", lambda text: True)
    with pytest.raises(DataError, match=r"all 18 dialogues in .* were rejected: all 17, several questions 1\."):
        run(index, server, out, rules=["all"])
    assert not (out / "shards").exists() and len(server.asked) == 18


def test_questions_are_sifted_like_answers(tmp_path, index):
    changed = lambda prompt: answer(prompt).replace("Is there a hat?", "Does the caption name a hat?")  # noqa: E731
    with endpoint(say=changed) as server:
        counts = run(index, server, tmp_path / "out")
    assert (counts["types"]["conversation"]["rules"], counts["types"]["conversation"]["kept"]) == ({"caption": 6}, 0)


def test_our_own_requests_are_not_sifted(tmp_path, server, index):
    counts = run(index, server, tmp_path / "out", requests=["What does the caption say?"])
    assert counts["types"]["detail_description"]["kept"] == 6


def test_without_pictures_only_the_json_is_written(tmp_path, server):
    index = make_records(tmp_path / "p", [{"caption": f"A {thing}."} for thing in THINGS] + [{}], [None] * 7)
    counts = run(index, server, tmp_path / "out")
    assert adds_up(counts) and counts["data"] == {"samples": 7, "without_context": 1}
    assert counts["written"]["samples"] == 0 and not (tmp_path / "out" / "shards").exists()
    assert json.loads((tmp_path / "out" / ENTRIES).read_text())[0]["image"] == "s0000.jpg"


def test_coco_files_are_converted_once(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(colour(1))
    images = [{"id": 1, "file_name": "1.png", "width": 4, "height": 4}]
    captions = {"images": images, "annotations": [{"image_id": 1, "caption": "A cat."}]}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(captions))
    data = InstructDataConfig(images=str(tmp_path / "photos"), captions=str(path))
    first, counts = open_images(data, tmp_path / "out", quiet=True)
    assert counts["samples"] == 1 and "missing" not in counts and first.read(0)["png"] == colour(1)
    made = {path: path.stat().st_mtime_ns for path in first.root.iterdir()}
    again, same = open_images(data, tmp_path / "out", quiet=True)
    assert same == counts and {path: path.stat().st_mtime_ns for path in again.root.iterdir()} == made
    (tmp_path / "out" / f"{first.root.name}.json").unlink()  # killed between the two
    assert open_images(data, tmp_path / "out", quiet=True)[1] == counts
    path.write_text(json.dumps({**captions, "annotations": [{"image_id": 1, "caption": "A dog."}]}))
    other, _ = open_images(data, tmp_path / "out", quiet=True)
    assert other.root != first.root and other.hash != first.hash


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requests": []}, "requests must not be empty"),
        ({"requests": ["What is it?", " "]}, "requests must not be empty or contain an empty string"),
        ({"rules": ["captions"]}, "no rule 'captions'. Did you mean 'caption'?"),
        ({"data": InstructDataConfig()}, "Give data.path=… for shards"),
        ({"data": InstructDataConfig(path="x", table="y")}, "Give data.path=… for shards"),
        ({"data": InstructDataConfig(path="x", images="y")}, "Give data.path=… for shards"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path, server, changes, says):
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, server, **changes)
    assert says in str(caught.value)


def test_without_a_usable_reply_the_reasons_are_named(tmp_path, index):
    with (
        ScriptedEndpoint(answer=lambda prompt: "Question:\nWhat?") as bad,
        pytest.raises(DataError, match=r"all 6 dialogues in .* were rejected: question without an answer 6\."),
    ):
        run(index, bad, tmp_path / "bad", samples=InstructSamplesConfig(9, 0, 0))
    assert adds_up(json.loads((tmp_path / "bad" / "report.json").read_text()))


def test_the_settings_name_every_response_type():
    for kind in (InstructSamplesConfig, InstructPromptsConfig):
        assert tuple(field.name for field in fields(kind)) == RESPONSE_TYPES
