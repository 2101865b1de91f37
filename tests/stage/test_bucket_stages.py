"""Stages on images in aspect buckets: a first stage learns all shapes, and what takes squares alone is refused."""

from dataclasses import replace

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.config import AspectBucketsConfig, ImageDataConfig
from mmlab.data.module import ShardDataModule
from mmlab.stage.largest_batch import largest_batch
from tests.data.test_bucket_mixture import make_pictures
from tests.stage.test_aligned_diffusion import aligned_stage
from tests.stage.tiny_adversarial import stage
from tests.stage.tiny_codes import code_stage
from tests.stage.tiny_stage import fit
from tests.tiny_shards import sources

BUCKETS = AspectBucketsConfig(max_aspect=2, step=4)


def test_a_first_stage_learns_validates_and_measures_all_shapes(tmp_path):
    make_pictures(tmp_path / "a", 7)
    listed = sources(tmp_path / "a")
    config = ImageDataConfig(train=listed, val=listed, size=16, buckets=BUCKETS, global_batch=2, micro_batch=2, seed=0)
    module, shapes = stage(), set()
    encode = module.model.first_stage.encode
    module.model.first_stage.encode = lambda x: shapes.add(tuple(x.shape[2:])) or encode(x)  # type: ignore[method-assign]
    fit(module, ShardDataModule(config, module.collate(config)), 2, val_every=2)
    assert shapes == set(config.shapes) and torch.isfinite(module.trainer.callback_metrics["val/psnr"])
    assert module.model.first_stage.measured
    batch = largest_batch(module, config)
    assert batch is not None and batch["pixel_values"].shape == (2, 3, 24, 12)
    assert largest_batch(module, replace(config, buckets=AspectBucketsConfig()))["pixel_values"].shape[2:] == (16, 16)  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"is less than the discriminator's"):
        module.collate(replace(config, size=12, buckets=AspectBucketsConfig(3, 4)))
    with pytest.raises(ConfigError, match=r"step=6 must be a multiple of 4"):
        module.collate(replace(config, size=36, buckets=AspectBucketsConfig(2, 6)))


def test_priors_and_alignments_take_squares():
    config = ImageDataConfig(size=8, buckets=AspectBucketsConfig(3, 4), global_batch=4, micro_batch=4, seed=0)
    for module, sentence in (
        (code_stage(), "code_prior learns images of one"),
        (aligned_stage(), "alignment compares"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            module.collate(config)
