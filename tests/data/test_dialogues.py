"""Records become the dialogues that a prompt asks for, or a named error."""

from dataclasses import replace

import pytest

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.dialogues import BRIEF_DESCRIPTION, DETAILED_DESCRIPTION, conversations_of
from mmlab.data.sample_types import SampleError


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"caption": "c"}, [("<image>", "c")]),
        (
            {"conversations": [{"from": "human", "value": "Q\n<image>"}, {"from": "gpt", "value": "c"}]},
            [("<image>", "c")],
        ),
    ],
)
def test_plain_is_an_image_and_its_caption(record: dict, expected: list) -> None:
    assert pairs(record, Prompt("plain")) == expected
    assert pairs(record, Prompt("plain", pictures="none")) == [("", "c")]


def pairs(record: dict, prompt: Prompt, seed: int = 0, picture: bool = True) -> list[tuple[str, str]]:
    return [(d[0].text, d[1].text) for d in conversations_of(record, prompt, seed, picture)]


def talk(*texts: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),
        ("  <image> What?", "<image>\nWhat?"),
        ("What?<image>", "<image>\nWhat?"),
        ("See <image> here", "<image>\nSee  here"),
        ("What?", "<image>\nWhat?"),
        ("<image>", "<image>"),
        ("<image>\nIs <image> a tag?", "<image>\nIs <image> a tag?"),
        ("<image>\n<image> is a tag", "<image>\n<image> is a tag"),
    ],
)
def test_the_image_comes_first(question: str, shown: str) -> None:
    assert pairs(talk(question, "a"), Prompt()) == [(shown, "a")]


def test_the_caption_stands_in_for_the_image() -> None:
    prompt = Prompt(pictures="text")
    record = {
        "caption": "A cat.",
        "questions": [{"question": "Who?", "answer": "x"}, {"question": "Why?", "answer": "y"}],
    }
    assert pairs(record, prompt, picture=False) == [("A cat.\nWho?", "x"), ("A cat.\nWhy?", "y")]
    assert pairs({"caption": "A cat."} | talk("<image>\nWho?", "x"), prompt, picture=False) == [("A cat.\nWho?", "x")]
    assert pairs(talk("Hello", "x"), prompt, picture=False) == [("Hello", "x")]
    assert pairs(talk("<image>\nWho?", "x"), Prompt(pictures="none"), picture=False) == [("Who?", "x")]
    assert reason(talk("<image>\nWho?", "x"), prompt, picture=False) == "no-caption"


@pytest.mark.parametrize("follow_ups", ["text", ["text"], [{"question": "q"}], [{"question": " ", "answer": "a"}]])
def test_malformed_follow_ups_are_errors(follow_ups) -> None:
    with pytest.raises(SampleError):
        conversations_of({"questions": [{"question": "q", "answer": "a", "follow_ups": follow_ups}]}, Prompt(), 0)


def test_the_part_of_a_record() -> None:
    record = {"caption": "c", "questions": [{"question": "q", "answer": "a"}]} | talk("h", "g")
    assert pairs(record, Prompt()) == [("<image>\nq", "a")]
    assert pairs(record, Prompt(turns="conversations"), picture=False) == [("h", "g")]
    (question, answer), *_ = pairs(record, Prompt(turns="caption"))
    assert question.removeprefix("<image>\n") in BRIEF_DESCRIPTION and answer == "c"
    drawn = {pairs({"caption": "c"}, Prompt(), seed)[0][0] for seed in range(200)}
    assert len(drawn) == len(BRIEF_DESCRIPTION) == 11
    marked = {"questions": [{"question": "<image>\nq", "answer": "a"}]}
    assert pairs(marked, Prompt()) == [("<image>\nq", "a")]
    several = {pairs({"captions": ["c", "d"]}, Prompt("plain"), seed)[0][1] for seed in range(20)}
    assert several == {"c", "d"}


def test_minigpt4_asks_with_its_own_questions() -> None:
    drawn = [pairs({"caption": "c"}, Prompt(requests="minigpt4"), seed)[0] for seed in range(100)]
    assert {question.removeprefix("<image>\n") for question, _ in drawn} == set(DETAILED_DESCRIPTION)
    again = [pairs({"caption": "c"}, Prompt(requests="minigpt4"), seed)[0] for seed in range(100)]
    assert again == drawn and len(DETAILED_DESCRIPTION) == 4


@pytest.mark.parametrize(
    ("caption", "learned"),
    [
        ('A "Red" Cat: (sitting)  on the Mat.\n', "a red cat sitting on the mat"),
        ("Don't stop, it's 3/4 full?", "don't stop, it's 3/4 full?"),
        (" ".join(f"W{i}" for i in range(60)), " ".join(f"w{i}" for i in range(50))),
    ],
)
def test_captions_as_blip_learns_them(caption: str, learned: str) -> None:
    for record in ({"caption": caption}, talk("<image>", caption)):
        assert pairs(record, Prompt("plain", captions="blip")) == [("<image>", learned)]
        assert pairs(record, Prompt("plain")) == [("<image>", caption)]
    assert pairs({"caption": caption}, Prompt(captions="blip"))[0][1] == learned
    assert reason({"caption": "..."}, Prompt("plain", captions="blip")) == "no-caption"


def reason(record: dict, prompt: Prompt | None = None, picture: bool = True) -> str:
    with pytest.raises(SampleError) as error:
        conversations_of(record, prompt or Prompt(), 0, picture)
    return error.value.reason


def turns(*texts: str) -> dict:
    return {"conversations": [dict(zip(("from", "value"), text.split(" ", 1), strict=True)) for text in texts]}


def test_what_surrounds_the_questions_and_answers() -> None:
    inner = "human <image>\nq", "gpt a", "human r", "gpt b"
    (dialogue,) = conversations_of(turns(*inner), Prompt(), 0)
    assert [(turn.role, turn.text) for turn in dialogue] == [
        *(("human", "<image>\nq"), ("gpt", "a")),
        *(("human", "r"), ("gpt", "b")),
    ]
    assert conversations_of(turns("gpt hi", *inner, "human bye"), Prompt(), 0) == [dialogue]
    told = turns("system Be brief. ", "gpt hi", *inner, "human bye")
    assert conversations_of(told, Prompt(), 0) == [[replace(dialogue[0], system="Be brief."), *dialogue[1:]]]
    assert pairs(told, Prompt("plain")) == [("<image>", "b")]
    assert conversations_of(turns("system  ", *inner), Prompt(), 0) == [dialogue]


def test_malformed_records_are_errors() -> None:
    assert reason({}) == "no-caption"
    assert reason({"caption": " "}, Prompt("plain")) == "no-caption"
    assert reason(talk("q")) == "no-answer"
    assert reason(talk("q", " ")) == "empty-answer"
    assert reason(turns("gpt a", "human q")) == reason(turns("system a")) == reason(turns("gpt a")) == "no-answer"
    assert reason(turns("human q", "human q", "gpt a")) == reason(turns("gpt a", "gpt a", "human q")) == "order"
    assert reason(turns("human q", "gpt a", "human q", "human q")) == "order"
    assert reason(turns("human q", "system s", "gpt a")) == reason(turns("user q", "assistant a")) == "role"
    assert reason({"conversations": [{"from": "system", "value": 5}, *talk("q", "a")["conversations"]]}) == "role"
    assert reason({"conversations": "text"}) == "turns"
    assert reason({"questions": [{"question": "q", "answer": ""}]}) == "empty-answer"
    assert reason({"questions": [{"question": None, "answer": "a"}]}) == "empty-question"
    assert reason({"questions": [{"question": " ", "answer": "a"}]}) == "empty-question"
    assert reason({"questions": [{"question": "", "answer": "a"}]}, picture=False) == "empty-question"
    assert reason(talk("<image>\n<image>\nCompare", "a")) == "pictures"
    assert reason(talk("<image><image>\nCompare", "a")) == "pictures"
    assert reason(talk("<image>\nq", "a", "<image>\nand this?", "b")) == "pictures"
    assert reason(talk("<image>\nq", "a"), picture=False) == "no-picture"
    assert reason(talk("q<image>", "a"), picture=False) == "no-picture"
    assert reason(talk("<image>", "a"), Prompt(pictures="none"), picture=False) == "empty-question"
    assert reason(talk("q", "a", " ", "b")) == "empty-question"


def test_config_errors() -> None:
    for wrong, near in (
        ("template", "v1"),
        ("pictures", "text"),
        ("supervise", "all"),
        ("turns", "caption"),
        ("captions", "blip"),
    ):
        with pytest.raises(ConfigError, match=f"{wrong}' cannot be '{near}x'. Did you mean '{near}'"):
            Prompt(**{wrong: near + "x"})  # type: ignore[arg-type]
    for template in ("plain", "minigpt4", "minigpt4_llama_2"):
        with pytest.raises(ConfigError, match=rf"{template} has no place for prompt\.system"):
            Prompt(template, system="Be brief.")
    with pytest.raises(ConfigError, match="pictures=none"):
        Prompt("plain", pictures="text")


def several(*texts: str, pictures: int = 2, prompt: Prompt | None = None) -> list[tuple[str, int]]:
    (dialogue,) = conversations_of(talk(*texts), prompt or Prompt(), 0, pictures)
    return [(turn.text, turn.images) for turn in dialogue if turn.role == "human"]


@pytest.mark.parametrize(
    ("questions", "shown"),
    [
        (["Is <image> left of <image>?"], [("Is <image> left of <image>?", 2)]),
        (["<image>\n<image>"], [("<image>\n<image>", 2)]),
        (["Which?"], [("<image>\n<image>\nWhich?", 2)]),
        ([""], [("<image>\n<image>", 2)]),
        (["<image> Who?", "And <image>?"], [("<image> Who?", 1), ("And <image>?", 1)]),
        (["Who?", "<image>\nOr\n<image>"], [("Who?", 0), ("<image>\nOr\n<image>", 2)]),
    ],
)
def test_several_images_stand_where_they_are_marked(questions: list[str], shown: list[tuple[str, int]]) -> None:
    texts = [text for question in questions for text in (question, "an <image> is a tag")]
    assert several(*texts) == shown


def test_as_many_images_are_marked_as_there_are_or_none() -> None:
    for question, marked in (("<image> Who?", "marks 1 image,"), ("<image> <image> <image>", "marks 3 images,")):
        with pytest.raises(SampleError, match=f"{marked} but the sample has 2") as caught:
            several(question, "a")
        assert caught.value.reason == "pictures"
    with pytest.raises(SampleError, match="A later question is empty") as caught:
        several("<image> and <image>?", "a", " ", "b")
    assert caught.value.reason == "empty-question"


def test_questions_share_several_images_and_captions_follow_them() -> None:
    record = {
        "caption": "c",
        "questions": [{"question": "q", "answer": "a"}, {"question": "<image> <image>", "answer": "b"}],
    }
    dialogues = conversations_of(record, Prompt(), 0, 2)
    assert [dialogue[0].text for dialogue in dialogues] == ["<image>\n<image>\nq", "<image> <image>"]
    ((shown, caption),) = conversations_of(record, Prompt("plain"), 0, 2)
    assert (shown.text, shown.images, caption.text) == ("<image><image>", 2, "c")
    ((asked, _),) = conversations_of(record, Prompt(turns="caption"), 0, 3)
    assert asked.text.startswith("<image>\n<image>\n<image>\n") and asked.images == 3
