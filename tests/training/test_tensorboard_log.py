"""TensorBoard's logger: what its own reader finds in the files afterwards."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmlab.config.errors import ConfigError
from mmlab.training.config import TensorBoardLogConfig
from mmlab.training.tensorboard_log import TensorBoardLog


def logger(run: Path) -> TensorBoardLog:
    return TensorBoardLog(TensorBoardLogConfig(save_dir=str(run)))


def events(run: Path) -> EventAccumulator:
    reader = EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
    reader.Reload()
    return reader


def scalars(run: Path, name: str) -> dict[int, float]:
    return {event.step: event.value for event in events(run).Scalars(name)}


def picture(run: Path, name: str) -> np.ndarray:
    (event,) = events(run).Images(name)
    return np.array(Image.open(io.BytesIO(event.encoded_image_string)))


def test_everything_is_in_the_files(tmp_path):
    log = logger(tmp_path)
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, 0)
    log.log_metrics({"val/loss": 3.0}, 0)
    red, noise = Image.new("RGB", (8, 6), "red"), np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    log.log_pictures("val/sheet", [red, noise], 1, ["a red field", "noise"])
    log.log_table("val/samples", ["picture", "question"], [[red, "what | why?"], [None, "how?"]], 1)
    log.finalize("success")
    assert scalars(tmp_path, "train/loss") == {1: 2.0} and scalars(tmp_path, "val/loss") == {1: 3.0}
    assert "epoch" not in events(tmp_path).Tags()["scalars"]
    assert picture(tmp_path, "val/sheet/0").shape == (6, 8, 3)
    assert np.array_equal(picture(tmp_path, "val/sheet/1"), noise)
    assert np.array_equal(picture(tmp_path, "val/samples/0"), np.array(red))
    (table,) = events(tmp_path).Tensors("val/samples/text_summary")
    assert table.step == 1
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| picture | question |", "| --- | --- |", "| val/samples/0 | what \\| why? |", "|  | how? |"
    ]  # fmt: skip
    assert (tmp_path / "metrics.csv").read_text() == "step,train/loss,val/loss\n1,2.0,3.0\n"
    assert [path.name.split(".")[0] for path in (tmp_path / "tensorboard").iterdir()] == ["events"]


def test_a_restart_replaces_what_is_trained_again(tmp_path):
    for steps, scale in ((range(6), 1.0), (range(3, 8), 10.0)):
        log = logger(tmp_path)
        for step in steps:
            log.log_metrics({"train/loss": step * scale}, step)
        log.finalize("failed")
    assert scalars(tmp_path, "train/loss") == {1: 0, 2: 1, 3: 2, 4: 30, 5: 40, 6: 50, 7: 60, 8: 70}


def test_a_repeated_validation_leaves_the_other_values_of_its_step(tmp_path):
    for values in ({"train/loss": 2.0}, {"val/loss": 3.0}):
        log = logger(tmp_path)
        log.log_metrics({"epoch": 0, **values}, 0)
        log.finalize("failed")
    assert scalars(tmp_path, "train/loss") == {1: 2.0} and scalars(tmp_path, "val/loss") == {1: 3.0}


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("mmlab.training.tensorboard_log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger=tensorboard needs a package: pip install 'mmlab\[tensorboard\]'\."):
        logger(tmp_path)
