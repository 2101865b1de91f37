"""A chat with one run or two, without the page."""

import html
import threading
from dataclasses import replace
from threading import Event

import pytest
import torch
from gradio import MultimodalTextbox

from mmlab.config.errors import RunError
from mmlab.data.sample_types import SampleError
from mmlab.demo.chat_page import chat_page
from mmlab.demo.serving import take_uploads
from mmlab.demo.talks import Speaker, Talk, TalkVisit
from mmlab.demo.visits import Visit, Visits
from mmlab.evaluate.streamed_answer import streamed_answer
from mmlab.model.language import LanguageOnly
from mmlab.stage.assembly import restore, run_prompt
from tests.demo.tiny_demo import MARKUP
from tests.tiny_files import bomb, png


@pytest.fixture(scope="module")
def speakers(chats):
    restored = {name: restore(chats / name) for name in ("before", "after")}
    return [Speaker(name, model, run_prompt(cfg), cfg.data) for name, (model, cfg) in restored.items()]


@pytest.fixture
def visit(speakers, tmp_path):
    return TalkVisit(tmp_path / "visit", talks=[Talk() for _ in speakers])


def asked(answerer, question="what color?"):
    dialogue = answerer.ask(question, 0)
    return answerer.tokens(dialogue, []), answerer([dialogue], [[]])[0]


def test_no_run_answers_without_the_picture(speakers, tmp_path):
    seeing = speakers[0]
    words = replace(seeing, model=LanguageOnly(seeing.model.language))
    visit = TalkVisit(tmp_path / "visit", talks=[Talk(), Talk()])
    answerers = [speaker.answerer(4, 0) for speaker in (seeing, words)]
    with pytest.raises(SampleError, match="a run that reads no pictures would answer without them"):
        visit.ask(answerers, "what color?", [("a.png", png(16, 16))])
    visit.ask(answerers, "what color?", [])
    assert len(visit.asked) == 1
    for shown, sources in (([seeing], ["upload"]), ([seeing, words], [])):
        page, _ = chat_page(shown, tmp_path, 4)
        (box,) = (block for block in page.blocks.values() if isinstance(block, MultimodalTextbox))
        assert box.sources == sources


def test_a_streamed_answer_grows_to_the_whole_one(speakers):
    answerer = speakers[0].answerer(12, 0)
    prompt, whole = asked(answerer)
    texts = list(streamed_answer(answerer, prompt, [], Event()))
    assert texts[-1] == whole and len(set(texts)) > 5
    assert all(whole.startswith(text) for text in texts)


def test_a_stopped_answer_stays_where_it_is(speakers):
    answerer, stop, texts = speakers[0].answerer(400, 0), Event(), []
    for text in streamed_answer(answerer, asked(speakers[0].answerer(1, 0))[0], [], stop):
        texts.append(text)
        if len(texts) == 3:
            stop.set()
    assert 3 <= len(texts) < 20
    assert speakers[1].answerer(1, 0), "other answers have their own"


def test_an_answer_that_nobody_reads_ends(speakers):
    answerer = speakers[0].answerer(10_000, 0)
    stream = streamed_answer(answerer, asked(speakers[0].answerer(1, 0))[0], [], Event())
    next(stream)
    count = threading.active_count()
    stream.close()
    assert threading.active_count() == count - 1


def test_a_failed_answer_raises(speakers, monkeypatch):
    answerer = speakers[0].answerer(4, 0)
    prompt, _ = asked(answerer)

    def fail(*args, **options):
        raise RunError("The logits are not finite.")

    monkeypatch.setattr(answerer.model.language, "generate", fail)
    with pytest.raises(RunError, match="not finite"):
        list(streamed_answer(answerer, prompt, [], Event()))


def test_both_runs_answer_the_same_questions(speakers, visit):
    answerers = [speaker.answerer(6, 0) for speaker in speakers]
    visit.ask(answerers, "what color?", [("a.png", png(40, 20))])
    first = list(visit.answer(answerers))[-1]
    assert first[0] != first[1], "each with its own model"
    visit.ask(answerers, "and this?", [("b.png", png(20, 40))])
    prompts = visit.prompts(answerers)
    for prompt, answer in zip(prompts, first, strict=True):
        assert prompt.count("tokens of a picture]") == 2 and answer in prompt and "and this? ASSISTANT:" in prompt
        assert prompt.startswith("<s>A chat between a curious user")
    second = list(visit.answer(answerers))[-1]
    for n, talk in enumerate(visit.talks):
        assert [turn.images for turn in talk.dialogue] == [1, 0, 1, 0]
        assert [turn.text for turn in talk.dialogue[1::2]] == [first[n], second[n]]
        alone = answerers[n]([talk.dialogue[:3]], [talk.pictures])
        assert alone == [second[n]]
    visit.retract()
    assert list(visit.answer(answerers))[-1] == second, "the same at temperature 0"
    assert len(list(visit.folder.iterdir())) == 2
    visit.clear()
    assert visit.messages(0) == [] and not visit.folder.exists()


def test_what_cannot_be_asked_changes_nothing(speakers, visit):
    answerers = [speaker.answerer(2, 0) for speaker in speakers]
    for question, files, sentence in (
        ("what?", [("a.png", png()), ("b.jpg", b"no")], "b.jpg cannot be read as an image: .*neither JPEG nor PNG"),
        ("what?", [("big.png", bomb())], "big.png cannot be read.*the cap of"),
        ("", [], "A question without an image is empty"),
        ("<image>?", [("a.png", png()), ("b.png", png())], "image"),
    ):
        with pytest.raises(SampleError, match=sentence):
            visit.ask(answerers, question, files)
        assert visit.messages(0) == [] and visit.talks[0].dialogue == [] and not visit.folder.exists()


def test_texts_are_no_markup(speakers, visit):
    answerers = [speaker.answerer(1, 0) for speaker in speakers]
    visit.ask(answerers, MARKUP, [])
    question, answer = visit.messages(0, MARKUP)
    assert question["content"] == [answer["content"]] == [html.escape(MARKUP)] != [MARKUP]
    assert MARKUP in visit.prompts(answerers)[0], "the model reads it as it is"


def test_a_visit_that_ends_is_stopped_and_deleted(tmp_path):
    visits = Visits(tmp_path, Visit)
    one, other = visits.of("a"), visits.of("../b")
    assert visits.of("a") is one and other.place().parent.parent == tmp_path
    for visit in (one, other):
        visit.place().write_text("picture")
    visits.end("a")
    visits.end("nobody")
    assert one.stop.is_set() and not one.folder.exists()
    assert not other.stop.is_set() and len(list(other.folder.iterdir())) == 1


def test_nothing_is_computed_once_the_server_has_ended(tmp_path):
    visits = Visits(tmp_path, Visit)
    one = visits.start("a")
    one.stop.set()
    assert not visits.start("a").stop.is_set(), "the next question is answered"
    visits.close()
    assert one.stop.is_set() and visits.start("a").stop.is_set() and visits.start("b").stop.is_set()


def test_a_file_that_was_uploaded_twice_is_read_once(tmp_path):
    one, gone = tmp_path / "a.png", tmp_path / "b.png"
    one.write_bytes(b"picture")
    assert take_uploads([str(one), str(one)]) == [("a.png", b"picture")] * 2 and not one.exists()
    one.write_bytes(b"picture")
    with pytest.raises(SampleError, match=r"b\.png is no longer on the server; add it again\."):
        take_uploads([str(one), str(gone)])
    assert not one.exists()


def test_temperature_changes_an_answer(speakers, visit):
    answerers = [speaker.answerer(8, 2.0) for speaker in speakers]
    visit.ask(answerers, "what?", [])
    torch.manual_seed(0)
    first = list(visit.answer(answerers[:1] * 2))[-1]
    visit.retract()
    assert list(visit.answer(answerers[:1] * 2))[-1] != first
