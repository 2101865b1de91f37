import math

import numpy as np
import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.aspects import bucket_of, bucket_shapes, covering, cropped
from mmlab.data.config import AspectBucketsConfig, ImageDataConfig, SourceConfig, StreamLoaderConfig
from mmlab.data.images import decode_image, resize
from mmlab.data.jpeg import reduction
from mmlab.data.sample_types import ImageSpec
from tests.tiny_files import png

SHAPES = bucket_shapes(512, 2, 64)


def test_buckets_have_about_equal_areas_and_sides_that_the_step_divides():
    wide = [(512, 512), (448, 576), (384, 640), (384, 704)]
    assert (*((width, height) for height, width in reversed(wide[1:])), *wide) == SHAPES
    for shapes, size, step in (
        (SHAPES, 512, 64),
        (bucket_shapes(64, 3, 8), 64, 8),
        (bucket_shapes(1024, 4, 64), 1024, 64),
    ):
        assert all(side % step == 0 for shape in shapes for side in shape)
        assert [math.prod(shape) / size**2 for shape in shapes] == pytest.approx([1] * len(shapes), abs=0.13)
        assert sorted(shapes, key=lambda shape: shape[1] / shape[0]) == list(shapes) and len(set(shapes)) == len(shapes)


def test_a_picture_takes_the_nearest_aspect_and_a_turned_one_the_turned_bucket():
    draw = np.random.default_rng(0)
    sides = np.concatenate([draw.integers(1, 65_536, (400, 2)), [(1, 1), (3, 2), (7, 7), (1, 65_535)]])
    numbers = bucket_of(sides[:, 0], sides[:, 1], SHAPES)
    aspects = np.log([width / height for height, width in SHAPES])
    distances = np.abs(np.log(sides[:, 0] / sides[:, 1])[:, None] - aspects)
    chosen = distances[np.arange(len(sides)), numbers]
    assert (chosen <= distances.min(1) + 1e-12).all() and len(set(numbers.tolist())) == len(SHAPES)
    assert [bucket_of(width, height, SHAPES) for width, height in sides.tolist()] == numbers.tolist()
    assert (bucket_of(sides[:, 1], sides[:, 0], SHAPES) == len(SHAPES) - 1 - numbers).all()
    # Exactly between the square and 4:9 or 9:4, and without a size: the square.
    between = ((18, 8), (12, 12), (8, 18))
    assert [bucket_of(width, height, between) for width, height in ((3, 2), (2, 3), (0, 0))] == [1, 1, 1]


def test_the_crop_is_centered_and_has_the_aspect_of_the_bucket():
    assert covering(100, 100, (32, 32)) == (0, 0, 100, 100)
    assert covering(300, 100, (32, 64)) == (50, 0, 200, 100) and covering(100, 300, (64, 32)) == (0, 50, 100, 200)
    assert covering(1, 900, (64, 32)) == (0, 449, 1, 2)
    assert cropped(300, 100, (32, 64)) == pytest.approx(1 / 3) and cropped(64, 32, (32, 64)) == 0


def test_a_picture_is_cropped_and_resized_to_its_bucket():
    spec = ImageSpec(8, "crop", buckets=bucket_shapes(8, 2, 2))
    assert spec.buckets[-1] == (6, 12)
    columns = torch.arange(240, dtype=torch.uint8).expand(3, 100, 240)
    found = resize(columns, spec)
    left, _, width, _ = covering(240, 100, (6, 12))
    assert found.shape == (3, 6, 12) and (left, width) == (20, 200)
    expected = left + (torch.arange(12) + 0.5) * width / 12
    assert (found[0, 3].float() - expected).abs().max() < 2
    assert decode_image(png(30, 30), spec).shape == (3, 8, 8)
    assert decode_image(png(30, 30), ImageSpec(8, buckets=((6, 10),))).shape == (3, 6, 10), "of one there is no choice"


def test_large_photos_are_reduced_only_where_the_crop_stays_in_place():
    spec = ImageSpec(32, "crop", reduce_jpegs=True, buckets=((40, 24), (32, 32), (24, 40)))
    for width, height in ((800, 480), (808, 480), (4000, 3000), (803, 480), (100, 60)):
        by = reduction(width, height, spec)
        shape = spec.buckets[bucket_of(width, height, spec.buckets)]
        small, whole = (covering(width // n, height // n, shape) for n in (by, 1))
        assert tuple(by * number for number in small) == whole and small[2] >= min(2 * shape[1], width)
    assert reduction(800, 480, spec) == 8 and reduction(803, 480, spec) == reduction(100, 60, spec) == 1


def test_what_does_not_go_with_buckets_is_refused():
    def data(**options):
        config = ImageDataConfig(
            **{"size": 32, "buckets": AspectBucketsConfig(2, 8), "train": [SourceConfig()], **options}
        )
        config.check_mixture()
        return config

    assert len(data().shapes) == 5 and data(buckets=AspectBucketsConfig()).shapes == ()
    assert data().check_step(4) is None and data(buckets=AspectBucketsConfig()).check_step(7) is None
    for message, options in {
        r"data.size=36 must be a multiple of data.buckets.step=8": {"size": 36},
        r"max_aspect=1.2 and data.buckets.step=8 leave only the square": {"buckets": AspectBucketsConfig(1.2, 8)},
        r"data.aspect=pad does not apply": {"aspect": "pad"},
        r"data.latents=true has cached squares": {"latents": True},
        r"leave out data/loader=stream": {"loader": StreamLoaderConfig()},
        r"does not go with data.balance=type": {"balance": "type"},
    }.items():
        with pytest.raises(ConfigError, match=message):
            data(**options)
    with pytest.raises(ConfigError, match=r"step=8 must be a multiple of 16, by which the model divides"):
        data().check_step(16)
    with pytest.raises(ConfigError, match=r"step=1 make 425 buckets, of which there may be 255; raise the step"):
        bucket_shapes(512, 2, 1)
    with pytest.raises(ConfigError, match="'max_aspect' must be at most 16, not inf"):
        AspectBucketsConfig(float("inf"))
    with pytest.raises(ConfigError, match="'max_aspect' must be above 1"):
        AspectBucketsConfig(1.0)
