"""`mmlab chat` with an image that it cannot read, and with a language model, which `mmlab eval` scores too."""

import json
import math

import pytest
import torch

from mmlab import cli
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import encode
from mmlab.data.shard_files import ShardWriter
from mmlab.data.turns import Turn
from mmlab.evaluate.answers import Answerer
from mmlab.stage.assembly import restore
from mmlab.verbs.chat import quoted, read_image_file
from tests.evaluate.tiny_scores import make_run
from tests.tiny_files import png


def test_a_wrong_path_names_the_nearest_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "photo.png").touch()
    for path, sentence in {
        "photos": "photos is a folder, not an image; it contains cat.jpg.",
        "photos/cats.jpg": "There is no image photos/cats.jpg. Did you mean 'photos/cat.jpg'?",
        "photoss": "There is no image photoss. Did you mean 'photo.png'?",
        "nowhere/cat.jpg": "There is no image nowhere/cat.jpg.",
    }.items():
        with pytest.raises(ConfigError) as error:
            read_image_file(path)
        assert str(error.value) == sentence
    assert read_image_file("photos/cat.jpg") == b"cat"


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder):
    """A folder with a language model's run, and shards of questions."""
    root = tmp_path_factory.mktemp("work")
    language = ["model=language_only", "model/language=llama_tiny", f"model.language.tokenizer={tokenizer_folder}"]
    stage = ["data=shapes", "stage=language_pretraining", "stage.prompt.template=v1", "stage.prompt.pictures=none"]
    make_run(root / "runs", "tongue", [*language, *stage], ["language"])
    with ShardWriter(root / "asked", quiet=True) as writer:
        for i, (question, answer, kind) in enumerate((("red?", "yes", "yesno"), ("color?", "red", "color"))):
            item = {"question": question, "answer": answer, "type": kind}
            writer.write(f"{i}", {"json": {"questions": [item], "caption": "red"}})
    return root


def run(work, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main([*argv, "trainer.accelerator=cpu"])
    return code, *capsys.readouterr()


def test_a_language_model_answers_and_has_a_perplexity(work, monkeypatch, capsys):
    code, out, err = run(work, monkeypatch, capsys, "chat", "run=tongue", "question=hello", "max_new_tokens=3")
    assert (code, len(out.splitlines())) == (0, 1), err
    code, out, err = run(work, monkeypatch, capsys, "eval", "run=tongue", "data.path=asked", "batch_size=1")
    assert code == 0, err
    scores = json.loads((work / "runs" / "tongue" / "eval" / "asked" / "scores.json").read_text())
    language = restore(work / "runs" / "tongue")[0].language
    dialogue = [Turn("human", "color?"), Turn("gpt", "red")]
    segment = encode(dialogue, Prompt("v1", pictures="none"), language.tokenizer)
    ids = torch.tensor([segment.input_ids])
    with torch.no_grad():
        losses = language.causal(ids).logits[0, :-1].log_softmax(-1)
    learned = [n for n, label in enumerate(segment.labels) if label >= 0]
    loss = -sum(float(losses[n - 1, segment.labels[n]]) for n in learned) / len(learned)
    numbers = {"perplexity": math.exp(loss), "answer_perplexity": math.exp(loss * len(learned)), "loss": loss}
    counts = {"questions": 1, "tokens": len(learned), "answers": 1}
    assert scores["types"]["color"] == pytest.approx({**numbers, **counts}, rel=1e-5)
    assert scores["questions"] == 2 and set(scores["types"]) == {"color", "yesno"}


def test_a_language_model_answers_the_questions_of_a_data_set(work, monkeypatch, capsys, tokenizer_folder):
    """As it was trained: with the caption of the picture in its place, or without."""
    asked = ("eval", "run=tongue", "data.path=asked", "metric=exact", "max_new_tokens=2")
    code, out, err = run(work, monkeypatch, capsys, *asked)
    assert code == 0, err
    assert "constant" in out and "distinct" in out
    language = ["model=language_only", "model/language=llama_tiny", f"model.language.tokenizer={tokenizer_folder}"]
    make_run(work / "runs", "told", [*language, "data=shapes", "stage=language_pretraining"], ["language"])
    prompts: list[str] = []
    complete = Answerer.complete

    def note(self, rows, pictures):
        prompts.extend(self.tokenizer.decode(row.input_ids) for row in rows)
        return complete(self, rows, pictures)

    monkeypatch.setattr(Answerer, "complete", note)
    code, _, err = run(work, monkeypatch, capsys, *asked, "run=told")
    assert code == 0, err
    assert len(prompts) == 2 and all(" red\n" in prompt for prompt in prompts), prompts
    prompts.clear()
    assert run(work, monkeypatch, capsys, *asked, "out=again")[0] == 0
    assert len(prompts) == 2 and not any(" red\n" in prompt for prompt in prompts)


def test_perplexities_have_the_types_of_answers(work, monkeypatch, capsys):
    """That of the question, or else of its record, or else the same name for none, in the last row."""
    ask = {"question": "red?", "answer": "yes"}
    turns = [{"from": "human", "value": "color?"}, {"from": "gpt", "value": "red"}]
    records = [{"questions": [ask, {**ask, "type": "zoom"}], "type": "detail"}, {"questions": [ask]}]
    with ShardWriter(work / "kinds", quiet=True) as writer:
        for i, record in enumerate([*records, {"conversations": turns}]):
            writer.write(f"{i}", {"json": record})
    for scored in ((), ("metric=exact", "max_new_tokens=2")):
        code, _, err = run(work, monkeypatch, capsys, "eval", "run=tongue", "data.path=kinds", "out=typed", *scored)
        assert code == 0, err
        scores = json.loads((work / "typed" / "scores.json").read_text())
        assert [(name, row["questions"]) for name, row in scores["types"].items()] == [
            ("detail", 1),
            ("zoom", 1),
            ("(none)", 2),
        ]


def test_what_a_language_model_cannot_do_is_one_sentence(work, monkeypatch, capsys):
    (work / "a.png").write_bytes(b"")
    for argv, sentence in {
        ("chat", "run=tongue", "image=a.png", "question=hi"): "tongue is a language model and sees no images",
        ("eval", "run=tongue", "data.path=asked", "metric=captions"): "leave out metric",
        ("eval", "run=tongue", "data.path=asked", "types=[count]"): "no texts of type count",
        ("eval", "run=tongue", "data.path=asked", "history=own"): "history=own applies to questions, and tongue",
    }.items():
        code, _, err = run(work, monkeypatch, capsys, *argv)
        assert code != 0 and sentence in err and "Traceback" not in err


@pytest.fixture(scope="module")
def sees(work, tokenizer_folder):
    """The name of a run that sees images as tiles; two images lie in the folder."""
    small = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, image_size: 16}"
    vision = ["model/vision=clip_tiny", f"model.vision.architecture={small}"]
    language = ["model/language=llama_tiny", f"model.language.tokenizer={tokenizer_folder}"]
    data = ["data=shapes", "data.aspect=anyres", "data.grids=[[1,2],[2,1]]", "stage=finetune"]
    parts = ["vision", "connector", "newline", "language"]
    make_run(work / "runs", "sees", ["model=llava_next", *vision, *language, *data], parts)
    for name, size in (("wide", (40, 12)), ("high", (10, 30))):
        (work / f"{name}.png").write_bytes(png(*size))
    return "sees"


@pytest.mark.parametrize(
    "text", ["is it red, or <image>?", "what's it?", "a\\", "\\'", "C:\\x {a: [b]}", '"what?"', "1"]
)
def test_a_question_may_have_any_characters(text):
    config = compose("chat", ["run=a", quoted(f"question={text}")])
    assert config.question == text.strip('"')
    assert quoted("run=a,b") == "run=a,b" and quoted("question=null") == "question=null"


BOTH = "image=[wide.png,high.png]"


def test_several_images_stand_where_the_question_marks_them(work, sees, monkeypatch, capsys):
    places = []
    complete = Answerer.complete

    def seen(self, prompts, pictures):
        places.append([prompts[0].image_starts, [len(picture.places) for picture in pictures[0]]])
        return complete(self, prompts, pictures)

    monkeypatch.setattr(Answerer, "complete", seen)
    ask = ("chat", f"run={sees}", "max_new_tokens=2")
    for question in ("which is red?", "<image> or <image>?"):
        code, out, err = run(work, monkeypatch, capsys, *ask, BOTH, f"question={question}")
        assert code == 0 and len(out.splitlines()) == 1, err
    (alike, tokens), (marked, again) = places
    assert tokens == again and len(set(tokens)) == 2
    gaps = [starts[1] - starts[0] - tokens[0] for starts in (alike, marked)]
    assert 0 < gaps[0] < gaps[1], "a line break, or the words between them"
    for image, question, sentence in (
        (BOTH, "<image>?", "it marks 1 image(s) with <image>, but image= names 2; mark each, or none."),
        ("image=wide.png", "<image><image>?", "it marks 2 image(s) with <image>, but image= names 1;"),
        ("image=null", "<image>?", "it marks 1 image(s) with <image>, but image= names none;"),
        ("image=[wide.png,hihg.png]", "?", "There is no image hihg.png. Did you mean 'high.png'?"),
        ("image=[wide.png,a.txt]", "?", "a.txt cannot be read as an image"),
    ):
        (work / "a.txt").write_text("no")
        code, _, err = run(work, monkeypatch, capsys, *ask, image, f"question={question}")
        assert code == 2 and sentence in err and "Traceback" not in err


def test_later_questions_show_the_next_images(work, sees, monkeypatch, capsys):
    asked = iter(["what is <image>?", "and <image>?", "and <image>?", "which is red?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    shown = []
    tokens = Answerer.tokens
    monkeypatch.setattr(
        Answerer, "tokens", lambda *args: shown.append([turn.images for turn in args[1]]) or tokens(*args)
    )
    code, out, err = run(work, monkeypatch, capsys, "chat", f"run={sees}", BOTH, "max_new_tokens=2")
    assert code == 0, err
    assert shown == [[1], [1, 0, 1], [1, 0, 1, 0, 0]]
    assert out.splitlines()[2] == (
        "The question cannot be asked: it marks 1 image(s) with <image>, but none of image= is left."
    )
