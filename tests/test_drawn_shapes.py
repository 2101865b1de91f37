"""The judge of experiments/drawn_shapes: the closest drawing tells shapes apart, and refuses what is none."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmlab.data.sources.scenes import COLORS, KINDS


@pytest.fixture(scope="module")
def judge():
    """The modules of the experiment."""
    names = ("figures", "classifier", "likeness")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "drawn_shapes"))
    try:
        import figures  # pyright: ignore[reportMissingImports]
        import likeness  # pyright: ignore[reportMissingImports]

        yield figures, likeness
    finally:
        sys.path.pop(0)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_the_closest_drawing_is_the_scene(judge):
    figures, likeness = judge
    scenes = likeness.real_scenes(24, "test")
    found = likeness.fits(scenes.pixels, scenes.kinds, scenes.colors)
    for one, shape in zip(found, scenes.shapes, strict=True):
        assert np.hypot(one.x - shape.x, one.y - shape.y) < 0.01 and abs(one.radius - shape.radius) < 0.01
        assert one.error < figures.LIKE / 2 and one.hue < figures.HUE
    others = likeness.fits(scenes.pixels, (scenes.kinds + 1) % len(KINDS), scenes.colors)
    assert all(wrong.error > right.error for wrong, right in zip(others, found, strict=True))
    wrong = likeness.fits(scenes.pixels, scenes.kinds, (scenes.colors + 1) % len(COLORS))
    assert all(one.hue > figures.HUE for one in wrong)


def test_what_is_not_a_drawing_is_refused(judge):
    figures, likeness = judge
    scenes = likeness.real_scenes(12, "test")
    ghosts = (scenes.pixels + scenes.pixels[::-1]) / 2
    noise = np.random.default_rng(0).random(scenes.pixels.shape)
    empty = np.full_like(scenes.pixels, 0.9)
    for pictures in (ghosts, noise, empty):
        found = likeness.fits(pictures, scenes.kinds, scenes.colors)
        assert all(one.error > figures.LIKE or one.hue > figures.HUE for one in found)


def test_samples_are_read_with_what_was_asked(judge, tmp_path):
    figures, _ = judge
    asked = ["star", "a small red circle"]
    pictures = [{"file": f"{n}.png", "condition": text} for n, text in enumerate(asked)]
    for one in pictures:
        Image.new("RGB", (32, 32), "white").save(tmp_path / one["file"])
    (tmp_path / "samples.json").write_text(json.dumps({"pictures": pictures}))
    pixels, kinds, colors = figures.read_samples(tmp_path)
    assert pixels.shape == (2, 32, 32, 3) and pixels.max() == 1
    assert [KINDS[kind] for kind in kinds] == ["star", "circle"]
    assert list(colors) == [-1, list(COLORS).index("red")]
