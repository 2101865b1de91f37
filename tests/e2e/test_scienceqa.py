"""ScienceQA from synthetic problems to scores, through the command line."""

import json
import shutil
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.config.errors import RunError
from mmlab.verbs import _scorings
from tests.tiny_commands import carry_out

TINY = "{hidden_size:32,intermediate_size:64,num_hidden_layers:2,num_attention_heads:2}"
TRAIN = "train experiment=llava/scienceqa_tiny stage.init_from=[] run.name=it data.global_batch=4 data.micro_batch=4"
# The vision encoder is trained too, so that the run saves it: there is no earlier run with one.
TRAIN += " stage.trainable=[vision,connector,language] stage.feature_cache_mb=0"
TRAIN += " data.max_length=400 trainer=cpu trainer.max_steps=2 trainer.limit_val_batches=0 logger=none"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A user's folder: problems, their shards, a tokenizer, a run."""
    folder = tmp_path_factory.mktemp("work")
    commands = ["shards problems data/problems --train 12 --val 4 --test 8 --size 32"]
    commands += [
        f"shards build scienceqa data/problems data/shapes/problems/{split} --split {split}"
        for split in ("train", "val", "test")
    ]
    commands += ["shards tokenizer data/shapes/problems/train --out data/shapes/tokenizer --vocab-size 320"]
    commands += [f"{TRAIN} model.vision.architecture={TINY} model.language.architecture={TINY}"]
    return carry_out(folder, commands)


@pytest.fixture
def mmlab(work, monkeypatch, capsys):
    monkeypatch.chdir(work)

    def run(command: str, code: int = 0) -> str:
        assert cli.main(command.split()) == code
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    return run


EVAL = "eval run=it data.path=data/shapes/problems/test max_new_tokens=3 batch_size=3 trainer.accelerator=cpu"


def test_answers_for_another_metric_are_not_resumed(mmlab, monkeypatch):
    resumed = []

    def stop(answerer, index, questions, batch_size, saved, *rest):
        resumed.append(len(saved.answers))
        saved.add({0: "an answer"})
        raise RunError("stopped")

    monkeypatch.setattr(_scorings, "predict", stop)
    for metric in ("exact", "exact", "scienceqa"):  # a metric leaves out the questions that it cannot score
        mmlab(f"{EVAL} metric={metric} out=stopped", 1)
    assert resumed == [0, 1, 0]


def test_generation_and_scores(mmlab):
    out = mmlab(f"{EVAL} metric=scienceqa out=scored data.train_from=data/shapes/problems/train")
    assert [line.split()[0] for line in out.splitlines()[1:10]] == [
        *("all", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
    ]
    scores = json.loads(Path("scored/scores.json").read_text())
    assert scores["metric"] == "scienceqa" and scores["questions"] == 8 and scores["types"]["IMG"]["questions"] == 4
    assert scores["failed"] == 8, "three tokens name no letter"
    assert 0 <= scores["question_only"]["accuracy"] <= 1 and scores["question_only"]["failed"] < 8
    assert scores["blind"]["failed"] == scores["blind"]["questions"] == 4, "half of the questions have a picture"
    rows = [json.loads(line) for line in Path("scored/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all("The answer is " in row["answer"] for row in rows)
    assert Path("scored/worst.html").read_text().count("<article") == 8
    assert not list(Path("scored").glob("*.unfinished.jsonl"))
    # `mmlab score` reads the replies in LLaVA's layout and computes the same scores.
    results = json.loads(Path("scored/results.json").read_text())
    assert set(results["results"].values()) == {-1} and results["count"] == 8
    again = mmlab("score scienceqa predictions=scored/results.json references=data/problems out=again")
    assert "recorded indices: 8 compared, 0 differ" in again
    both = (json.loads(Path(folder, "scores.json").read_text()) for folder in ("scored", "again"))
    one, other = ({name: scores[name] for name in ("accuracy", "failed", "types")} for scores in both)
    assert one == other


def test_reasoning_is_not_cut_off_before_its_answer(mmlab, monkeypatch):
    longest = []

    def empty_replies(answerer, prompts, _):
        longest.append(answerer.options["max_new_tokens"])
        return [("", True)] * len(prompts)

    monkeypatch.setattr("mmlab.evaluate.answers.Answerer.complete", empty_replies)
    for metric in ("scienceqa", "exact"):
        mmlab(f"{EVAL.replace('max_new_tokens=3 ', '')} metric={metric} limit=1 blind=0 out=empty")
    assert longest == [1024, 64]


@pytest.mark.parametrize(("answered", "left"), [(3, 5 + 4), (8 + 3, 1)])
def test_a_killed_evaluation_is_resumed(mmlab, monkeypatch, answered, left):
    """Eight questions, and four of them without their picture."""
    from mmlab.evaluate.answers import Answerer

    asked = []
    answer = Answerer.complete

    def dies(self, prompts, pictures):
        if len(asked) == answered:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return answer(self, prompts, pictures)

    monkeypatch.setattr(Answerer, "complete", dies)
    shutil.rmtree("killed", ignore_errors=True)
    mmlab(f"{EVAL} out=killed", 130)
    assert not Path("killed/scores.json").exists()
    monkeypatch.setattr(Answerer, "complete", answer)
    asked.clear()
    monkeypatch.setattr(Answerer, "complete", lambda *args: asked.extend(args[1]) or answer(*args))
    mmlab(f"{EVAL} out=killed")
    assert len(asked) == left, "the others were answered before"
    mmlab(f"{EVAL} out=straight")
    files = ("predictions.jsonl", "scores.json")
    assert all(Path("killed", name).read_text() == Path("straight", name).read_text() for name in files)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("metric=sciencqa", 2, "Did you mean 'scienceqa'?"),
        ("metric=pope", 1, "the right answer must be yes or no, not"),
        ("metric=captions describe=false", 2, "answers questions"),
        ("metric=vqa describe=true", 2, "describes images"),
    ],
)
def test_an_unsuitable_metric_is_refused_before_a_model_is_loaded(mmlab, monkeypatch, options, code, message):
    def loaded(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mmlab.stage.assembly.restore", loaded)
    assert message in mmlab(f"{EVAL} {options} out=refused", code)
    assert not Path("refused").exists()


def test_missing_captions_are_reported_before_a_model_is_loaded(mmlab, monkeypatch):
    monkeypatch.setattr("mmlab.stage.assembly.restore", lambda *_: pytest.fail("a model was loaded"))
    assert "has no caption to compare" in mmlab(f"{EVAL} metric=captions out=refused", 1)


def test_descriptions_are_compared_with_captions(mmlab):
    """The captions are those of the synthetic scenes; their tokenizer differs, but only the words matter here."""
    mmlab("shards build shapes data/shapes/val --split val --count 4 --size 32")
    out = mmlab(
        "eval run=it data.path=data/shapes/val metric=captions max_new_tokens=3 out=described trainer.accelerator=cpu"
    )
    assert "cider d" in out and "bleu 4" in out and "incoherent" in out
    scores = json.loads(Path("described/scores.json").read_text())
    assert scores["descriptions"] == 4 and all(0 <= scores[name] <= 1 for name in ("bleu_1", "bleu_4", "rouge_l"))
    assert Path("described/worst.html").read_text().count("<article") == 4
    assert not Path("described/descriptions.unfinished.jsonl").exists()
