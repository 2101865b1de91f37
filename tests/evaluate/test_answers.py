"""Answers to questions, and the file from which a killed evaluation resumes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.conversation import encode
from mmlab.data.dialogues import conversations_of
from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.data.turns import Turn
from mmlab.evaluate.answer_report import predict
from mmlab.evaluate.answers import Answerer, AnswerFile, answer_questions
from mmlab.evaluate.questions import read_pictures, read_questions
from mmlab.stage.config import EndToEndFinetuningConfig
from tests.model import tiny
from tests.stage.tiny_stage import data_of, fit, make_stage
from tests.tiny_files import png
from tests.tiny_pictures import square
from tests.tiny_shapes import make_records, make_shapes

STRETCH = ImageTextDataConfig(aspect="stretch")

FACTS = {"what is it?": "a red star", "how many of them are there?": "two", "is it red?": "yes"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Questions that can be answered without the image; the last has none."""
    records = [{"questions": [{"question": q, "answer": a}]} for q, a in FACTS.items()]
    return make_records(tmp_path_factory.mktemp("facts") / "train", records, [png(), png(), None])


@pytest.mark.parametrize(
    ("template", "system"), [("v1", ""), ("v0", ""), ("v0", None), ("chatml", ""), ("llama_2", "")]
)
def test_answers_end_at_the_template_s_stop(tokenizer_folder, facts, template, system):
    prompt = Prompt(template, system=system)
    config = EndToEndFinetuningConfig(trainable=["connector", "language"], prompt=prompt)
    stage = make_stage(config, tiny.vlm(tokenizer_folder))
    fit(stage, data_of(stage, [facts.root], 3, 3, max_length=400), 60)
    answerer = Answerer(stage.model.eval(), prompt, STRETCH, max_new_tokens=40)
    ends = []
    generate = stage.model.generate

    def watched(*args, **options):
        new = generate(*args, **options)
        ends.append(new.shape[1])
        return new

    stage.model.generate = watched
    questions = read_questions(facts)
    answers = dict(answer_questions(answerer, facts, questions, batch_size=3))
    assert {questions[n].text: text for n, text in answers.items()} == FACTS
    assert max(ends) < 30, "generation stopped by itself"
    assert (answerer.options.get("stop_strings") is None) == (template in ("v1", "llama_2"))


@pytest.mark.parametrize(
    ("template", "said", "answer"),
    [
        ("v0", " red\n### Human: more", "red"),
        ("v0", " red # 1", "red # 1"),
        ("chatml", "red<|im_end|>\n<|im_start|>user", "red"),
        ("v1", " red</s><pad><pad>", "red"),
        ("v1", " red USER: more", "red USER: more"),
        ("v1", "</s>", ""),
    ],
)
def test_text_after_the_stop_is_removed(tokenizer_folder, template, said, answer):
    model = tiny.vlm(tokenizer_folder)
    ids = model.language.tokenizer(said, add_special_tokens=False)["input_ids"]
    model.generate = lambda *args, **options: torch.tensor([ids])
    answerer = Answerer(model, Prompt(template, system=""), STRETCH)
    assert answerer([answerer.ask("what?", 0)], [[]]) == [answer]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model with different answers for all images and questions, and shapes to ask about."""
    root = make_shapes(tmp_path_factory.mktemp("shapes"), train=6)
    model = tiny.vlm(root / "tokenizer")
    with torch.no_grad():
        for parameter in [*model.language.parameters(), *model.connector.parameters()]:
            parameter.mul_(4)
    return root, model


@pytest.mark.parametrize("batch_size", [4, 64])
def test_batched_answers_equal_answers_one_by_one(untrained, batch_size):
    root, model = untrained
    index = ShardIndex.open(root / "train")
    questions = read_questions(index)
    answerer = Answerer(model, Prompt("v1", system=""), STRETCH, max_new_tokens=6)
    batched = dict(answer_questions(answerer, index, questions, batch_size))
    assert sorted(batched) == list(range(len(questions))) and len(questions) > 15
    alone = []
    for question in questions:
        shown = answerer.decode(read_pictures(index, question.sample))
        alone += answerer([answerer.ask(question.text, 1)], [shown])
    assert [batched[n] for n in range(len(questions))] == alone
    assert len(set(alone)) > len(alone) // 2, "they differ, so that a mix-up would show"


def test_rows_with_and_without_images_are_batched_together(untrained):
    _, model = untrained
    answerer = Answerer(model, Prompt("v1", system=""), STRETCH, max_new_tokens=6)
    picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    questions = ["what color is the circle?", "how many?", "is there a star?"]
    pictures = [[], [square(picture, 4)], []]
    dialogues = [answerer.ask(q, len(p)) for q, p in zip(questions, pictures, strict=True)]
    together = answerer(dialogues, pictures)
    assert together == [answerer([d], [p])[0] for d, p in zip(dialogues, pictures, strict=True)]


def test_a_dialogue_of_several_turns(untrained):
    _, model = untrained
    answerer = Answerer(model, Prompt("v1", system=""), STRETCH, max_new_tokens=4)
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    first = answerer.ask("what is it?", 1)
    assert [turn.role for turn in first] == ["human"] and first[0].text == "<image>\nwhat is it?"
    dialogue = [*first, Turn("gpt", "a star"), Turn("human", "is it red?")]
    assert isinstance(answerer([dialogue], [[square(picture, 4)]])[0], str)


def test_a_model_may_see_no_image(untrained):
    _, model = untrained
    prompt = replace(Prompt("v1", system=""), pictures="none")
    answerer = Answerer(model, prompt, STRETCH, max_new_tokens=4)
    black, white = (torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (0, 255))
    answers = {answerer([answerer.ask("what is it?", 1)], [[square(p, 4)]])[0] for p in (black, white)}
    assert len(answers) == 1
    assert answerer.spec == ImageSpec(16, "stretch", 4)


def test_a_temperature_samples_tokens(untrained):
    _, model = untrained
    torch.manual_seed(0)
    answerer = Answerer(model, Prompt("v1", system=""), STRETCH, max_new_tokens=6, temperature=2.0)
    assert len({answerer([answerer.ask("what?", 0)], [[]])[0] for _ in range(6)}) > 1


ABOUT = {"parts": {"language": "abc"}, "limit": None}


def test_saved_answers_are_read(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    saved = AnswerFile(path, ABOUT)
    assert saved.answers == {} and not path.exists()
    saved.add({4: "a\nb", 1: "ü\u2028"})
    saved.add({0: ""})
    assert AnswerFile(path, dict(reversed(ABOUT.items()))).answers == {4: "a\nb", 1: "ü\u2028", 0: ""}
    saved.remove()
    assert not path.exists() and AnswerFile(path, ABOUT).answers == {}


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, ABOUT).add({0: "first", 1: "second"})
    path.write_bytes(path.read_bytes()[:-4])
    saved = AnswerFile(path, ABOUT)
    assert saved.answers == {0: "first"}
    saved.add({1: "again"})
    assert AnswerFile(path, ABOUT).answers == {0: "first", 1: "again"}


def test_answers_that_depend_on_anything_else_are_discarded(tmp_path):
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, ABOUT).add({0: "first"})
    other = AnswerFile(path, {**ABOUT, "limit": 3})
    assert other.answers == {}
    other.add({2: "new"})
    assert AnswerFile(path, ABOUT).answers == {} and AnswerFile(path, {**ABOUT, "limit": 3}).answers == {2: "new"}


class Repeats:
    """Answers each question with its own text, and is killed after some batches."""

    def __init__(self, batches: int):
        self.batches = batches
        self.asked: list[str] = []

    def decode(self, files):
        return []

    def ask(self, question, pictures, earlier=(), system=None, caption=None, images=()):
        return "".join(f"{text} {answer} " for text, answer in earlier) + question

    def tokens(self, dialogue, pictures):
        return dialogue

    def complete(self, prompts, pictures):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.asked += prompts
        return [(f"{text}!", True) for text in prompts]


def test_saved_answers_are_not_computed_again(tmp_path):
    records = [{"questions": [{"question": f"number {n}?", "answer": "1"}]} for n in range(7)]
    index: ShardIndex = make_records(tmp_path / "shards", records, [None] * 7)
    questions = read_questions(index)
    first, path = Repeats(2), tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(first, index, questions, 2, AnswerFile(path, ABOUT))  # type: ignore[arg-type]
    second = Repeats(9)
    predictions = predict(second, index, questions, 2, AnswerFile(path, ABOUT))  # type: ignore[arg-type]
    assert predictions == [f"number {n}?!" for n in range(7)]
    assert len(first.asked) == 4 and sorted(first.asked + second.asked) == [f"number {n}?" for n in range(7)]
    third = Repeats(0)
    assert predict(third, index, questions, 2, AnswerFile(path, ABOUT)) == predictions  # type: ignore[arg-type]


def test_a_bad_image_costs_only_its_own_questions(untrained, tmp_path):
    _, model = untrained
    asked = [[{"question": text, "answer": "1"} for text in (f"number {n}?", "x?")] for n in range(4)]
    records = [{"questions": questions} for questions in asked]
    index = make_records(tmp_path / "shards", records, [png(), png()[:40], png(), None])
    questions, bad = read_questions(index), BadSamples("shards", 4)
    answerer = Answerer(model, Prompt("v1", system=""), STRETCH, max_new_tokens=2)
    for saved in (AnswerFile(tmp_path / "answers.jsonl", ABOUT), AnswerFile(tmp_path / "answers.jsonl", ABOUT)):
        predictions = predict(answerer, index, questions, 3, saved, bad)
        assert [text is None for text in predictions] == [False] * 2 + [True] * 2 + [False] * 4
        assert bad.reasons == {"decode": 1} and list(bad.errors) == ["s0001"]
    assert sorted(AnswerFile(tmp_path / "answers.jsonl", ABOUT).answers) == [0, 1, 4, 5, 6, 7]


TALK = [("what is it?", "a star"), ("is it red?", "no"), ("is it big?", "yes")]


@pytest.fixture
def talks(tmp_path):
    """Two dialogues of several turns, one of which has a system message of its own."""
    turns = [{"from": role, "value": text} for pair in TALK for role, text in zip(("human", "gpt"), pair, strict=True)]
    first = [{**turns[0], "value": "<image>\n" + TALK[0][0]}, *turns[1:]]
    records = [{"conversations": first}, {"conversations": [{"from": "system", "value": "Be brief."}, *turns[:4]]}]
    return make_records(tmp_path / "talks", records, [png(), None])


def test_later_questions_follow_the_right_answers_or_the_model_s_own(talks):
    questions = read_questions(talks)
    asked = ["what is it?", "what is it? a star is it red?", "what is it? a star is it red? no is it big?"]
    for size in (1, 2, 9):
        model = Repeats(9)
        predictions = predict(model, talks, questions, size)  # type: ignore[arg-type]
        assert predictions == [f"{text}!" for text in asked + asked[:2]]
        own = predict(Repeats(9), talks, questions, size, own=True)  # type: ignore[arg-type]
        second = "what is it? what is it?! is it red?"
        third = f"{second} {second}! is it big?"
        assert own == ["what is it?!", f"{second}!", f"{third}!", "what is it?!", f"{second}!"]


def test_each_dialogue_of_a_sample_follows_its_own_answers(tmp_path):
    asked = [
        {"question": first, "answer": "x", "follow_ups": [{"question": later, "answer": "y"}]}
        for first, later in (("color?", "sure?"), ("count?", "sure?"), ("color?", "why?"))
    ]
    index = make_records(tmp_path / "two", [{"questions": asked}], [png()])
    own = predict(Repeats(9), index, read_questions(index), 9, own=True)  # type: ignore[arg-type]
    assert own[1::2] == ["color? color?! sure?!", "count? count?! sure?!", "color? color?! why?!"]


def test_own_answers_resume(talks, tmp_path):
    questions, path = read_questions(talks), tmp_path / "answers.jsonl"
    whole = predict(Repeats(9), talks, questions, 2, own=True)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        predict(Repeats(2), talks, questions, 2, AnswerFile(path, ABOUT), own=True)  # type: ignore[arg-type]
    assert predict(Repeats(9), talks, questions, 2, AnswerFile(path, ABOUT), own=True) == whole  # type: ignore[arg-type]


@pytest.fixture
def later(tmp_path):
    """Dialogues that show pictures after their first question."""
    asked = [("<image> Who?", "And <image>?"), ("Who?", "<image> or\n<image>"), ("Who?", "<image>\nWhat?")]
    with ShardWriter(tmp_path / "later", quiet=True) as writer:
        for n, (first, second) in enumerate(asked):
            said = zip(("human", "gpt") * 2, (first, "a", second, "b"), strict=True)
            record = {"conversations": [{"from": role, "value": text} for role, text in said]}
            writer.write(f"s{n}", {"json": record, "png": png()} | ({"0.png": png()} if n < 2 else {}))
    return writer.index


@pytest.mark.parametrize("shards", ["talks", "later"])
def test_a_question_is_asked_as_it_was_trained(untrained, shards, request, monkeypatch):
    """The prompt of a question is the training sequence up to its answer."""
    _, model = untrained
    prompt, index = Prompt("v1", turns="conversations"), request.getfixturevalue(shards)
    answerer, questions = Answerer(model, prompt, STRETCH), read_questions(index)
    prompts: list[list[int]] = []
    monkeypatch.setattr(answerer, "complete", lambda rows, _: prompts.extend(r.input_ids for r in rows) or [("", True)])
    assert all(dict(answer_questions(answerer, index, [question], 1)) == {0: ""} for question in questions)
    for question, asked in zip(questions, prompts, strict=True):
        shown = answerer.decode(read_pictures(index, question.sample))
        record = parse_record(index.read(question.sample, ("json",)))
        (dialogue,) = conversations_of(record, prompt, 0, len(shown))
        trained = encode(dialogue, prompt, answerer.tokenizer, [4] * len(shown)).input_ids
        assert trained[: len(asked)] == asked and len(asked) < len(trained)


def test_a_caption_stands_for_pictures_where_training_puts_it(later):
    prompt = Prompt("v1", pictures="text", turns="conversations")
    for question in read_questions(later):
        record = {**parse_record(later.read(question.sample, ("json",))), "caption": "a star"}
        (trained,) = conversations_of(record, prompt, 0, 0)
        place = (question.earlier, question.system, "a star", question.images)
        asked = Answerer.ask(SimpleNamespace(prompt=prompt), question.text, 0, *place)  # type: ignore[arg-type]
        assert trained[: len(asked)] == asked
