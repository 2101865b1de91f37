"""Tiles of pictures of any shape, compared with transformers' LLaVA-NeXT."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlavaNextProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel

from mmlab.config.errors import ConfigError
from mmlab.data.anyres import best_grid, image_spec, places_of
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.images import decode_picture
from mmlab.data.sample_types import NEWLINE, ImageSpec
from mmlab.export.processors import grid_pixels, image_processor
from tests.export.tiny_chats import photo, png

GRIDS = tuple(tuple(grid) for grid in ImageTextDataConfig().grids)
PUBLISHED = ImageSpec(336, "anyres", 576, GRIDS)  # of LLaVA-NeXT: tiles of 24 x 24 features
DRAWN = np.random.default_rng(0)
# Of any shape, with sides that are those of the grids among them.
SIZES = [tuple(map(int, 2 ** DRAWN.uniform(2, 12, 2))) for _ in range(150)]
SIZES += [tuple(map(int, DRAWN.choice([335, 336, 337, 672, 1008, 1344], 2))) for _ in range(50)]


def test_grids_and_counts_are_those_of_transformers():
    """And each place takes the feature that `pack_image_features` puts there."""
    pinpoints = grid_pixels(PUBLISHED)
    assert pinpoints == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    images = SimpleNamespace(image_grid_pinpoints=pinpoints)
    processor = SimpleNamespace(image_processor=images, patch_size=14, num_additional_image_tokens=0)
    processor._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(processor, *sizes)  # type: ignore[arg-type]
    tower = SimpleNamespace(image_size=336, patch_size=14)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=tower, image_grid_pinpoints=pinpoints))
    for width, height in SIZES:
        rows, columns = best_grid(width, height, PUBLISHED)
        assert [rows * 336, columns * 336] == list(select_best_resolution((height, width), pinpoints)), (width, height)
        places = places_of(width, height, PUBLISHED)
        count = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)  # type: ignore[arg-type]
        assert len(places) == count <= PUBLISHED.most_tokens, (width, height)
        features = torch.arange((1 + rows * columns) * 576).view(-1, 576, 1)
        packed, _ = LlavaNextModel.pack_image_features(
            model,  # type: ignore[arg-type]
            [features],
            [(height, width)],
            "default",
            torch.tensor([NEWLINE]),
        )
        assert np.array_equal(packed[0][:, 0].numpy(), places), (width, height)


def test_tiles_are_those_of_transformers():
    """Up to rounding, which differs between Pillow and torch: by at most 2 of 255."""
    spec = ImageSpec(24, "anyres", 9, GRIDS)
    processor = image_processor(spec, [0.5] * 3, [0.5] * 3)
    for width, height in ((24, 24), (48, 24), (50, 31), (31, 50), (9, 100), (200, 90), (13, 7)):
        image = photo(width, height)
        ours = decode_picture(png(image), spec).tiles.numpy().astype(int)
        theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        assert theirs.shape == ours.shape == (1 + np.prod(best_grid(width, height, spec)), 3, 24, 24)
        assert np.abs(theirs - ours).max() <= 2 and np.abs(theirs - ours).mean() < 0.25, (width, height)


@pytest.mark.parametrize(
    ("newline", "grids", "says"),
    [
        (None, [[1, 2]], "data.aspect=anyres needs the newline of LLaVA-NeXT, .* use model=llava_next"),
        (True, [[1, 2], [3]], r"data.grids has \[3\]; give pairs of rows and columns"),
        (True, [[0, 2]], r"data.grids has \[0, 2\]; give pairs"),
        (True, [], "data.grids is empty; give pairs"),
    ],
)
def test_what_cannot_be_cut_is_refused(newline, grids, says):
    model = SimpleNamespace(vision=SimpleNamespace(image_size=24), tokens_per_image=9, newline=newline)
    with pytest.raises(ConfigError, match=says):
        image_spec(model, ImageTextDataConfig(aspect="anyres", grids=grids))
