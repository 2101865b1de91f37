"""Sheets of fixed validation samples during training."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.module import ShardDataModule
from mmlab.evaluate.callbacks.sample_sheets import AnsweredSamples, Card
from mmlab.evaluate.config import AnsweredSamplesConfig
from mmlab.report.contact_sheet import BAD, GOOD
from mmlab.stage.config import EndToEndFinetuningConfig, ProjectorAlignmentConfig
from mmlab.training.step_loop import StepFitLoop
from tests.model import tiny
from tests.stage.tiny_stage import QUESTIONS, make_stage
from tests.tiny_shapes import make_shapes
from tests.tiny_shards import sources


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=6)


def stage_of(root: Path, prompt: Prompt = QUESTIONS, kind: Any = EndToEndFinetuningConfig) -> Any:
    torch.manual_seed(0)
    trainable = ["connector", "language"] if kind is EndToEndFinetuningConfig else ["connector"]
    return make_stage(kind(trainable=trainable, prompt=prompt), tiny.vlm(root / "tokenizer"))


def train(root: Path, folder: Path, stage: Any, *callbacks: L.Callback, steps: int = 4, val_every: int = 1) -> Any:
    train, val = sources(root / "train"), sources(root / "val")
    batch = {"global_batch": 4, "micro_batch": 4, "seed": 0}
    config = ImageTextDataConfig(train=train, val=val, **batch, max_length=120, aspect="stretch")
    data = ShardDataModule(config, stage.collate(config))
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=-1,
        max_steps=data.plan(steps),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    StepFitLoop(trainer, val_every)
    trainer.fit(stage, data)
    return stage


class Watch(L.Callback):
    """The random state and the modes at each training batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        modes = tuple(module.training for module in pl_module.modules())
        state = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
        self.seen.append((modes, state))


def test_training_does_not_change(root, tmp_path):
    with_samples, without = Watch(), Watch()
    torch.manual_seed(1)
    shown = train(
        root, tmp_path, stage_of(root), with_samples, AnsweredSamples(AnsweredSamplesConfig(count=3, max_new_tokens=4))
    )
    torch.manual_seed(1)
    plain = train(root, tmp_path, stage_of(root), without)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [f"step-{n}.png" for n in range(1, 5)]
    assert with_samples.seen == without.seen
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in shown.state_dict().items())


def test_at_most_so_many_sheets_and_the_last(root, tmp_path):
    samples = AnsweredSamples(AnsweredSamplesConfig(count=2, sheets=2, max_new_tokens=2))
    train(root, tmp_path, stage_of(root), samples, steps=7)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-4.png", "step-7.png"]
    assert Image.open(tmp_path / "samples" / "step-7.png").width > 500


class Kept(AnsweredSamples):
    cards: list[Card] = []

    def _write(self, trainer, cards, step) -> None:
        self.cards = cards


def test_the_samples_are_spread_and_their_questions_vary(root, tmp_path):
    kept = Kept(AnsweredSamplesConfig(count=3, max_new_tokens=2))
    stage = train(root, tmp_path, stage_of(root), kept, steps=1)
    keys = [card.cells["key"] for card in kept.cards]
    assert len(set(keys)) == 3 and keys == sorted(keys)
    for card in kept.cards:
        assert set(card.cells) == {"key", "question", "answer", "prediction"} and card.cells["answer"]
        assert "<image>" not in card.cells["question"] and card.cells["question"].endswith("?")
        assert card.picture is not None and card.picture.shape == (3, 16, 16)
    before = kept._chosen
    train(root, tmp_path, stage, kept, steps=1)
    assert kept._chosen is before, "the same samples each time"


def test_a_stage_without_questions_shows_captions(root, tmp_path):
    kept = Kept(AnsweredSamplesConfig(count=2, max_new_tokens=2))
    train(root, tmp_path, stage_of(root, Prompt("plain"), ProjectorAlignmentConfig), kept, steps=1)
    assert [card.cells["question"] for card in kept.cards] == ["", ""]
    assert all(card.cells["answer"] and card.text for card in kept.cards)


def test_colors(monkeypatch):
    from mmlab.data.turns import Turn
    from mmlab.evaluate.callbacks.sample_sheets import answer_card

    def color(answer: str, prediction: str) -> str | None:
        return answer_card(
            "k", None, [Turn("human", "<image>\nwhat?", images=1), Turn("gpt", answer)], prediction
        ).color

    assert color("red", "Red.") == GOOD and color("red", "blue") == BAD
    assert color("a big red circle", "a circle") is None
    card = answer_card("k", None, [Turn("human", "<image>\nwhat?", images=1), Turn("gpt", "red")], "")
    assert card.text == "what?\n(nothing)\n(right: red)"


def test_other_models_show_nothing(root):
    samples = AnsweredSamples(AnsweredSamplesConfig())
    trainer: Any = SimpleNamespace(datamodule=None)
    assert samples.show(trainer, SimpleNamespace(model=torch.nn.Linear(1, 1))) == []


def test_an_unreadable_sample_is_left_out(root, tmp_path, monkeypatch):
    from mmlab.evaluate.callbacks import sample_sheets

    read = sample_sheets.read_pictures

    def fails_first(index, i):
        if i == 0:
            raise TypeError("broken")
        return read(index, i)

    monkeypatch.setattr(sample_sheets, "read_pictures", fails_first)
    kept = Kept(AnsweredSamplesConfig(count=3, max_new_tokens=2))
    train(root, tmp_path, stage_of(root), kept, steps=1)
    assert len(kept.cards) == 2


class Tables:
    """A logger that takes tables and images."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        self.calls.append((name, columns, [row[1:] for row in rows], step))

    def log_pictures(self, name: str, pictures: list[Image.Image], step: int) -> None:
        self.calls.append((name, len(pictures), step))


def test_every_logger_that_takes_tables_and_images_has_them(tmp_path):
    logger, picture = Tables(), torch.zeros(3, 8, 8, dtype=torch.uint8)
    trainer: Any = SimpleNamespace(default_root_dir=tmp_path, loggers=[logger, SimpleNamespace()])
    cards = [Card(picture, {"key": "a"}, "a"), Card(None, {"key": "b"}, "b")]
    AnsweredSamples(AnsweredSamplesConfig())._write(trainer, cards, 3)
    assert logger.calls == [("val/samples", ["picture", "key"], [["a"], ["b"]], 3), ("val/samples_sheet", 1, 3)]
    assert (tmp_path / "samples" / "step-3.png").is_file()
