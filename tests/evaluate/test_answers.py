"""Answers of a model that has learned a few by heart, and of one that has not."""

from dataclasses import replace

import pytest
import torch

from mmlab.data.config import Prompt
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.data.turns import Turn
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.questions import read_picture, read_questions
from mmlab.stage.vision_language import EndToEndFinetuning
from tests.model import tiny
from tests.stage.tiny_stage import data_of, fit, optim
from tests.tiny_files import png
from tests.tiny_shapes import make_records, make_shapes

FACTS = {"what is it?": "a red star", "how many of them are there?": "two", "is it red?": "yes"}


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Questions whose answers are known without looking; the last has no picture."""
    records = [{"questions": [{"question": q, "answer": a}]} for q, a in FACTS.items()]
    return make_records(tmp_path_factory.mktemp("facts") / "train", records, [png(), png(), None])


@pytest.mark.parametrize(
    ("template", "system"), [("v1", ""), ("v0", ""), ("v0", None), ("chatml", ""), ("llama_2", "")]
)
def test_answers_end_at_the_template_s_stop(tokenizer_folder, facts, template, system):
    prompt = Prompt(template, system=system)
    stage = EndToEndFinetuning(tiny.vlm(tokenizer_folder), optim(), ["connector", "language"], prompt)
    fit(stage, data_of(stage, [facts.root], 3, 3, max_length=400), 60)
    answerer = Answerer(stage.model.eval(), prompt, "stretch", max_new_tokens=40)
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
def test_what_follows_the_stop_is_cut(tokenizer_folder, template, said, answer):
    model = tiny.vlm(tokenizer_folder)
    ids = model.language.tokenizer(said, add_special_tokens=False)["input_ids"]
    model.generate = lambda *args, **options: torch.tensor([ids])
    answerer = Answerer(model, Prompt(template, system=""), "stretch")
    assert answerer([answerer.ask("what?", None)], [None]) == [answer]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A model that says something else to every picture and question, and shapes to ask about."""
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
    answerer = Answerer(model, Prompt("v1", system=""), "stretch", max_new_tokens=6)
    batched = dict(answer_questions(answerer, index, questions, batch_size))
    assert sorted(batched) == list(range(len(questions))) and len(questions) > 15
    alone = []
    for question in questions:
        picture = read_picture(index, question.sample, answerer.spec)
        alone += answerer([answerer.ask(question.text, picture)], [picture])
    assert [batched[n] for n in range(len(questions))] == alone
    assert len(set(alone)) > len(alone) // 2, "they differ, so that a mix-up would show"


def test_text_alone_and_pictures_go_together(untrained):
    _, model = untrained
    answerer = Answerer(model, Prompt("v1", system=""), "stretch", max_new_tokens=6)
    picture = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    questions = ["what color is the circle?", "how many?", "is there a star?"]
    pictures = [None, picture, None]
    dialogues = [answerer.ask(q, p) for q, p in zip(questions, pictures, strict=True)]
    together = answerer(dialogues, pictures)
    assert together == [answerer([d], [p])[0] for d, p in zip(dialogues, pictures, strict=True)]


def test_a_dialogue_goes_on(untrained):
    _, model = untrained
    answerer = Answerer(model, Prompt("v1", system=""), "stretch", max_new_tokens=4)
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    first = answerer.ask("what is it?", picture)
    assert [turn.role for turn in first] == ["human"] and first[0].text == "<image>\nwhat is it?"
    dialogue = [*first, Turn("gpt", "a star"), Turn("human", "is it red?")]
    assert isinstance(answerer([dialogue], [picture])[0], str)


def test_pictures_may_stand_as_nothing(untrained):
    _, model = untrained
    prompt = replace(Prompt("v1", system=""), pictures="none")
    answerer = Answerer(model, prompt, "stretch", max_new_tokens=4)
    black, white = (torch.full((3, 16, 16), value, dtype=torch.uint8) for value in (0, 255))
    answers = {answerer([answerer.ask("what is it?", p)], [p])[0] for p in (black, white)}
    assert len(answers) == 1
    assert answerer.spec == ImageSpec(16, "stretch", 4)


def test_temperature_draws(untrained):
    _, model = untrained
    torch.manual_seed(0)
    answerer = Answerer(model, Prompt("v1", system=""), "stretch", max_new_tokens=6, temperature=2.0)
    assert len({answerer([answerer.ask("what?", None)], [None])[0] for _ in range(6)}) > 1
