"""Where the pictures of a batch stand, and what each of their places takes."""

import torch

from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import NEWLINE, Picture

FEATURES = 4


def picture(tiles: int, places: list[int], color: int = 0) -> Picture:
    return Picture(torch.full((tiles, 3, 2, 2), color, dtype=torch.uint8), torch.tensor(places))


def test_each_place_takes_a_feature_of_its_own_picture():
    wide = picture(3, [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, NEWLINE], color=1)
    square = picture(1, [0, 1, 2, 3], color=2)
    batch = place_pictures([Shown(wide, 1, 5, "a"), Shown(square, 0, 2, "b"), Shown(wide, 0, 9, "c")], FEATURES, 2)
    colors = batch["pixel_values"][:, 0, 0, 0].tolist()
    assert colors == [1, 1, 1, 2, 1, 1, 1]
    features = torch.arange(len(colors) * FEATURES + 1)
    features[-1] = -7
    row = torch.full((2, 20), -1)
    row.index_put_(batch["image_positions"].unbind(1), features[batch["image_features"]])
    own = [0, 1, 2, 3, 4, 5, 8, 9, -7, 6, -7]
    assert row[1].tolist() == [-1] * 5 + own + [-1] * 4
    assert row[0].tolist() == [-1] * 2 + [12, 13, 14, 15] + [-1] * 3 + [n + 16 if n >= 0 else n for n in own]


def test_without_a_picture_there_are_no_places():
    batch = place_pictures([], FEATURES, 2)
    assert batch["pixel_values"].shape == (0, 3, 2, 2) and batch["image_positions"].shape == (0, 2)
    assert batch["image_features"].shape == (0,) and batch["image_keys"] == []


def test_no_tile_has_the_key_of_another_sample():
    """Keys may have folders, with a dot too: features are cached by key."""
    keys = ["a", "a.1", "a/1", "a.1/1", "a.tile1/b", "a/tile1"]  # the second one is a sample's second picture
    shown = [Shown(picture(3, [0]), n, 0, key) for n, key in enumerate(keys)]
    tiles = place_pictures(shown, FEATURES, 2)["image_keys"]
    assert len(set(tiles)) == len(tiles) == 18 and tiles[::3] == keys
