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
from mmlab.training.flops import BatchFlops
from mmlab.training.progress import Progress, known_peak
from tests.model import tiny
from tests.stage.tiny_stage import CAPTIONS, data_of, fit, make_stage
from tests.tiny_shapes import make_shapes

BAR: Any = {"enable_progress_bar": True}  # ours; `fit` turns Lightning's off


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=8)


def run(root, steps: int, micro_batch: int = 4, **options) -> Progress:
    progress = Progress(ProgressConfig(**options))
    config = ProjectorAlignmentConfig(trainable=["connector"], prompt=CAPTIONS)
    stage = make_stage(config, tiny.vlm(root / "tokenizer"))
    fit(stage, data_of(stage, [root / "train"], micro_batch=micro_batch), steps, callbacks=[progress], **BAR)
    return progress


def test_plain_lines_where_there_is_no_terminal(root, capsys):
    run(root, 6, lines=3)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert len(out.splitlines()) == 1 and out.startswith("attention of the language model: ") and "\r" not in err
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
    trainer = stand_in(global_step=0, max_steps=10, world_size=2, precision="32-true")
    module = stand_in(log_dict=lambda values, batch_size: logged.update(values), device=torch.device("cpu"))
    progress.on_train_start(trainer, module)
    for micro in range(1, 9):
        clock[0] += 1
        progress.on_train_batch_start(trainer, module, None, 0)
        clock[0] += 3
        trainer.global_step = micro // 2
        batch = {"keys": ["a"] * 4, "stats": {"one": {"tokens": 20}, "other": {"tokens": 12, "bad": 1}}}
        progress.on_train_batch_end(trainer, module, None, batch, 0)
        if micro == 1:
            assert not logged, "half a step says nothing"
        elif micro % 2 == 0:
            assert logged.pop("perf/memory_gib") > 0.05
            speeds = {"samples_per_s": 2.0, "tokens_per_s": 16.0, "data_wait": 0.25}
            assert logged == {f"perf/{name}": pytest.approx(value) for name, value in speeds.items()}
    assert len(progress.recent) == 4 and isinstance(progress.recent, deque)


class Logged(L.Callback):
    """The values that a step has logged."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values = {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def stage(root):
    config = ProjectorAlignmentConfig(trainable=["connector"], prompt=CAPTIONS, feature_cache_mb=1)
    return make_stage(config, tiny.vlm(root / "tokenizer"))


def test_utilization_of_a_stated_peak(root, stage, monkeypatch):
    """Two steps of four samples: images whose features are cached are not encoded again."""
    progress, logged, flops = Progress(ProgressConfig(peak_tflops=1e-3)), Logged(), []
    end = BatchFlops.end
    monkeypatch.setattr(BatchFlops, "end", lambda self: flops.append(end(self)) or flops[-1])
    fit(stage, data_of(stage, [root / "train"], global_batch=4, micro_batch=4), 4, callbacks=[progress, logged], **BAR)
    (first, _), (last, _) = progress.recent[0], progress.recent[-1]
    assert logged.values["perf/mfu"] == pytest.approx(sum(flops[1:]) / (last - first) / 1e9)
    assert logged.values["perf/tokens_per_s"] > logged.values["perf/samples_per_s"]
    assert {encoded for _, _, encoded in progress.flops.counted} == {0, 4}


def test_counting_trains_the_same_weights(root):
    weights = []
    for peak in (None, 1.0):
        config = ProjectorAlignmentConfig(trainable=["connector"], prompt=CAPTIONS)
        stage = make_stage(config, tiny.vlm(root / "tokenizer"))
        fit(stage, data_of(stage, [root / "train"]), 3, callbacks=[Progress(ProgressConfig(peak_tflops=peak))], **BAR)
        weights.append([weight.clone() for weight in stage.model.connector.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_peak_of_a_gpu_that_trains_in_16_bits_is_known(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    gpu = torch.device("cuda", 0)
    assert known_peak(gpu, "bf16-mixed") == known_peak(gpu, "bf16-true") == 989
    assert known_peak(gpu, "32-true") is None and known_peak(torch.device("cpu"), "bf16-mixed") is None


def test_a_failed_step_leaves_no_counting(root, stage):
    class Fail(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(
            stage,
            data_of(stage, [root / "train"]),
            1,
            callbacks=[Progress(ProgressConfig(peak_tflops=1)), Fail()],
            **BAR,
        )
    assert not torch._C._len_torch_dispatch_stack()


def test_a_terminal_has_a_bar_that_is_closed(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(ProgressConfig())
    monkeypatch.setattr(progress, "get_metrics", lambda *a: {"v_num": 3, "train/loss": torch.tensor(1.5)})
    trainer = stand_in(global_step=2, max_steps=10, world_size=1, precision="32-true")
    module = stand_in(log_dict=lambda values, batch_size: None, device=torch.device("cpu"))
    progress.on_train_start(trainer, module)
    assert progress.bar is not None and progress.bar.n == 2
    trainer.global_step = 3
    progress.on_train_batch_start(trainer, module, None, 0)
    progress.on_train_batch_end(trainer, module, None, {"keys": ["a"], "stats": {}}, 0)
    assert progress.bar.n == 3
    progress.on_exception(trainer, module, KeyboardInterrupt())
    assert progress.bar is None
    err = capsys.readouterr().err
    assert "train/loss 1.5" in err and "v_num" not in err


def test_only_the_first_rank_speaks(capsys):
    progress = Progress(ProgressConfig())
    progress.disable()
    trainer = stand_in(global_step=0, max_steps=1, world_size=2, precision="32-true")
    module = stand_in(log_dict=lambda values, batch_size: None, device=torch.device("cpu"))
    progress.on_train_start(trainer, module)
    trainer.global_step = 1
    progress.on_train_batch_start(trainer, module, None, 0)
    progress.on_train_batch_end(trainer, module, None, {"keys": ["a"], "stats": {}}, 0)
    assert capsys.readouterr().err == ""
