"""Batches of samples with none, one or two pictures, each one square or several tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlab.data.shard_files import ShardWriter
from mmlab.stage.assembly import put_on_adapters
from mmlab.stage.largest_batch import largest_batch
from mmlab.training import checkpoint_io
from mmlab.training.config import EMAConfig, LoRAConfig
from mmlab.training.ema import EMA
from mmlab.training.resume_proof import difference
from tests.stage.tiny_several import TRAINED, data_of, make_several, tiles_stage
from tests.stage.tiny_stage import first_batch, fit
from tests.tiny_files import png
from tests.tiny_shapes import make_shapes
from tests.tiny_trainer import Kill, KillAt, run

BOTH = pytest.mark.parametrize("aspect", ["anyres", "stretch"])


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = make_shapes(tmp_path_factory.mktemp("several"))
    make_several(root / "several")
    return root


def learnt(stage: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.named_parameters() if weight.requires_grad}


def gradients(stage: Any, data: Any) -> dict[str, torch.Tensor]:
    """Of the first batch's loss, and that loss."""
    stage.zero_grad()
    loss, tokens = stage.double().loss(first_batch(stage, data))
    (loss / tokens).backward()
    weights = {name: weight.grad.clone() for name, weight in stage.named_parameters() if weight.grad is not None}
    return {"loss": loss.detach(), **weights}


@BOTH
@pytest.mark.parametrize("tongue", ["llama", "bloom"])
def test_packed_rows_and_cached_features_learn_the_same(root, aspect, tongue):
    """Bloom takes no mask: its packed rows are separated again."""
    stage = tiles_stage(root / "tokenizer", tongue)
    plain = data_of(stage, root / "several", aspect, micro_batch=6)
    packed = data_of(stage, root / "several", aspect, micro_batch=6, pack=True, max_length=240)
    one, other = (first_batch(stage, data) for data in (plain, packed))
    assert sorted(one["image_keys"]) == sorted(other["image_keys"])
    assert len(one["input_ids"]) == 6 > len(other["input_ids"])
    expected = gradients(stage, plain)
    assert bool(expected["model.newline.feature"].any()) == (aspect == "anyres")
    torch.testing.assert_close(gradients(stage, packed), expected, atol=1e-9, rtol=1e-6)
    cached = tiles_stage(root / "tokenizer", tongue, feature_cache_mb=8)
    for data in (plain, packed, plain):
        torch.testing.assert_close(gradients(cached, data), expected, atol=1e-9, rtol=1e-6)
    assert len(cached.cache.entries) == len(one["image_keys"])


@BOTH
def test_two_ranks_learn_what_one_learns(root, aspect):
    """With micro-batches of one sample, some of them have no picture."""
    trained = []
    for micro, ranks in ((6, 1), (1, 2)):
        stage = tiles_stage(root / "tokenizer")
        fit(stage, data_of(stage, root / "several", aspect, micro_batch=micro), 3, ranks, precision="64-true")
        trained.append({name: weight.float() for name, weight in learnt(stage).items()})
    torch.testing.assert_close(*trained)


def test_a_run_that_was_killed_equals_the_straight_one(root, tmp_path):
    def train(folder: Path, *callbacks: Any) -> None:
        folder.mkdir(exist_ok=True)
        stage = tiles_stage(root / "tokenizer", feature_cache_mb=8)
        data = data_of(stage, root / "several", pack=True, max_length=240)
        run(stage, data, folder, 6, [*callbacks, EMA(EMAConfig(decay=0.5))])

    train(tmp_path / "straight")
    with pytest.raises(Kill):
        train(tmp_path / "killed", KillAt("start", 9))
    train(tmp_path / "killed")
    state, again = (checkpoint_io.read(tmp_path / name / "checkpoints" / "step-6") for name in ("straight", "killed"))
    assert difference(state, again) is None
    assert {name.split(".")[1] for name in state["state_dict"]} == set(TRAINED)


def test_adapters_learn_beside_connector_and_newline(root):
    stage = tiles_stage(root / "tokenizer", lora={"language": LoRAConfig(rank=2, alpha=4, dropout=0.0)})
    put_on_adapters(stage, ["language"])
    before, ema = learnt(stage), EMA(EMAConfig(decay=0.5))
    fit(stage, data_of(stage, root / "several"), 3, callbacks=[ema])
    assert {f"model.{name}" for name in ema.average} == set(before)
    assert not any(torch.equal(weight, before[name]) for name, weight in learnt(stage).items())


@BOTH
def test_the_largest_batch_is_that_of_the_largest_picture(root, tmp_path, aspect):
    """A square picture has the most tiles, and no padding among them."""
    with ShardWriter(tmp_path / "large", quiet=True) as writer:
        question = {"question": "what is it?", "answer": "a long square"}
        for n in range(3):
            writer.write(f"s{n}", {"json": {"questions": [question]}, "png": png(64, 64)})
    stage = tiles_stage(root / "tokenizer")
    data = data_of(stage, tmp_path / "large", aspect)
    length = first_batch(stage, data)["input_ids"].shape[1]
    largest = largest_batch(stage, data_of(stage, tmp_path / "large", aspect, max_length=length).config)
    real = first_batch(stage, data)
    assert largest is not None
    shapes = [{name: x.shape for name, x in batch.items() if hasattr(x, "shape")} for batch in (largest, real)]
    assert shapes[0] == shapes[1] and len(largest["image_keys"]) == len(real["image_keys"])
    assert len(real["pixel_values"]) == (15 if aspect == "anyres" else 3)
