"""What a run says about itself while it runs."""

import re
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from mmlab.stage.config import ProjectorAlignmentConfig
from mmlab.training.config import ProgressConfig
from mmlab.training.progress import Progress
from tests.model import tiny
from tests.stage.tiny_stage import CAPTIONS, data_of, fit, make_stage
from tests.tiny_shapes import make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=8)


def run(root, steps: int, micro_batch: int = 4, **options) -> Progress:
    progress = Progress(ProgressConfig(**options))
    config = ProjectorAlignmentConfig(trainable=["connector"], prompt=CAPTIONS)
    stage = make_stage(config, tiny.vlm(root / "tokenizer"))
    fit(stage, data_of(stage, [root / "train"], micro_batch=micro_batch), steps, callbacks=[progress])
    return progress


def test_plain_lines_where_there_is_no_terminal(root, capsys, monkeypatch):
    # `fit` turns Lightning's own bar off; ours is a ProgressBar and would go with it.
    made = L.Trainer

    def with_bar(**options):
        return made(**{**options, "enable_progress_bar": True})

    monkeypatch.setattr(L, "Trainer", with_bar)
    run(root, 6, lines=3)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert out == "" and "\r" not in err
    assert [line.split(":")[0] for line in lines] == ["step 2/6", "step 4/6", "step 6/6"]
    number = r"[\d.e+-]+"
    for line in lines:
        assert re.fullmatch(rf"step \d/6: train/loss {number}, \d+ samples/s, data wait \d+%", line), line


def stand_in(**attributes: Any) -> Any:
    return SimpleNamespace(**attributes)


def test_speed_and_wait_over_the_recent_steps(monkeypatch):
    """Two micro-batches of 4 samples a step, 1 s of waiting and 3 s of work in each."""
    clock = [0.0]
    monkeypatch.setattr("mmlab.training.progress.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    progress = Progress(ProgressConfig())
    progress.disable()
    logged: dict[str, float] = {}
    trainer = stand_in(global_step=0, max_steps=10, world_size=2)
    module = stand_in(log_dict=lambda values, batch_size: logged.update(values))
    progress.on_train_start(trainer, module)
    for micro in range(1, 9):
        clock[0] += 1
        progress.on_train_batch_start(trainer, module, None, 0)
        clock[0] += 3
        trainer.global_step = micro // 2
        progress.on_train_batch_end(trainer, module, None, {"keys": ["a"] * 4}, 0)
        if micro == 1:
            assert not logged, "half a step says nothing"
        elif micro % 2 == 0:
            assert logged == {"perf/samples_per_s": pytest.approx(2.0), "perf/data_wait": pytest.approx(0.25)}
    assert len(progress.recent) == 4 and isinstance(progress.recent, deque)


def test_a_terminal_has_a_bar_that_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(ProgressConfig())
    monkeypatch.setattr(progress, "get_metrics", lambda *a: {"v_num": 3, "train/loss": torch.tensor(1.5)})
    trainer = stand_in(global_step=2, max_steps=10, world_size=1)
    module = stand_in(log_dict=lambda values, batch_size: None)
    progress.on_train_start(trainer, module)
    assert progress.bar is not None and progress.bar.n == 2
    trainer.global_step = 3
    progress.on_train_batch_start(trainer, module, None, 0)
    progress.on_train_batch_end(trainer, module, None, {"keys": ["a"]}, 0)
    assert progress.bar.n == 3
    progress.on_exception(trainer, module, KeyboardInterrupt())
    assert progress.bar is None
    err = capsys.readouterr().err
    assert "train/loss 1.5" in err and "v_num" not in err


def test_only_the_first_rank_speaks(capsys):
    progress = Progress(ProgressConfig())
    progress.disable()
    trainer = stand_in(global_step=0, max_steps=1, world_size=2)
    module = stand_in(log_dict=lambda values, batch_size: None)
    progress.on_train_start(trainer, module)
    trainer.global_step = 1
    progress.on_train_batch_start(trainer, module, None, 0)
    progress.on_train_batch_end(trainer, module, None, {"keys": ["a"]}, 0)
    assert capsys.readouterr().err == ""
