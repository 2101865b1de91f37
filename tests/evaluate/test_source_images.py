"""Images to start from, and masks of what is drawn of them: read like other images, and kept where they should be."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.data.sample_types import ImageSpec
from mmlab.diffusion.config import DiffusionConfig, SamplerConfig
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.samplers import SAMPLERS, Sampler
from mmlab.evaluate.pictures.generators import DiffusionGenerator, picture_generator, steps_from
from mmlab.evaluate.pictures.source_images import IMAGE, MASK, source_images
from mmlab.model.first_stage import Identity
from tests.evaluate.tiny_scores import SIDE, Unshuffle
from tests.stage.tiny_diffusion import diffusion_model
from tests.tiny_files import bomb

SPEC = ImageSpec(SIDE, "crop")
LABELS = {"labels": torch.tensor([0, 2, 1])}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, color, size in (("red", "red", (16, 8)), ("blue", "blue", (16, 8)), ("small", "red", (4, 4))):
        Image.new("RGB", size, color).save(tmp_path / f"{name}.png")
    half = Image.new("L", (16, 8))
    half.paste(255, (8, 0, 16, 8))
    half.save(tmp_path / "half.png")
    Image.new("1", (16, 8)).save(tmp_path / "black.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "bomb.jpg").write_bytes(bomb())
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path


def test_images_and_masks_are_used_in_turn(files):
    names = [str(files / "red.png"), str(files / "blue.png")]
    inputs = source_images(names, [str(files / "half.png")], 3, SPEC)
    assert inputs[IMAGE].shape == (3, 3, SIDE, SIDE) and inputs[IMAGE].dtype == torch.uint8
    assert [tuple(image[:, 0, 0].tolist()) for image in inputs[IMAGE]] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    # Image and mask are cropped alike.
    assert inputs[MASK].dtype == torch.bool and inputs[MASK].shape == (3, 1, SIDE, SIDE)
    assert inputs[MASK][..., SIDE // 2 :].all() and not inputs[MASK][..., : SIDE // 2].any()
    assert MASK not in source_images(names, [], 2, SPEC) and source_images([], [], 2, SPEC) == {}


def test_padding_is_kept(files):
    mask = source_images([str(files / "red.png")], [str(files / "half.png")], 1, ImageSpec(16, "pad"))[MASK][0, 0]
    assert not mask[:4].any() and not mask[12:].any() and mask[4:12, 8:].all()


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (["gone.png"], [], r"image=.*gone\.png cannot be read: .*No such file"),
        (["broken.png"], [], r"image=.*broken\.png cannot be read: unreadable image"),
        (["bomb.jpg"], [], r"image=.*bomb\.jpg cannot be read: .*30000"),
        (["text.png"], [], "neither JPEG nor PNG nor WebP"),
        (["red.png"], ["gone.png"], r"mask=.*gone\.png cannot be read"),
        (["red.png"], ["small.png"], r"mask=.*small\.png has 4 x 4 pixels, and image=.*red\.png 16 x 8"),
        (["red.png", "small.png"], ["half.png"], r"mask=.*half\.png has 16 x 8 pixels, and image=.*small\.png 4 x 4"),
        (["red.png"], ["black.png"], r"mask=.*black\.png has nothing white"),
        (["red.png"], ["half.png", "half.png"], "mask has 2 files and image 1"),
    ],
)
def test_mistakes_are_one_sentence(files, images, masks, message):
    with pytest.raises(ConfigError, match=message) as error:
        source_images([str(files / name) for name in images], [str(files / name) for name in masks], 2, SPEC)
    assert "\n" not in str(error.value)


def generator(name: str, strength: float, latents: bool = True) -> DiffusionGenerator:
    sampler, process = Sampler(SamplerConfig(name=name, steps=6)), Diffusion(DiffusionConfig(target="v"))
    model = diffusion_model(Unshuffle() if latents else Identity()).eval()
    made = picture_generator(model, sampler, process, size=SIDE, strength=strength)
    assert isinstance(made, DiffusionGenerator)
    return made


def sources(mask: bool) -> dict[str, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=drawn)
    area = torch.zeros(3, 1, SIDE, SIDE, dtype=torch.bool)
    area[:, :, 3:6, 2:5] = True
    return LABELS | {IMAGE: pixels} | ({MASK: area} if mask else {})


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("latents", [False, True])
def test_what_is_not_masked_is_kept_and_each_image_depends_on_its_seed(name, latents):
    inputs = sources(mask=True)
    draw = generator(name, 1.0, latents)
    made = draw(inputs, [5, 6, 7])
    changed = (made.int() - inputs[IMAGE].int()).abs().amax(1, keepdim=True) > 1
    area = inputs[MASK]
    if latents:
        # A latent of 2 x 2 pixels is drawn if one of them is white.
        area = torch.zeros_like(area)
        area[:, :, 2:6, 2:6] = True
        source = draw.source(inputs)
        assert source is not None and source.mask is not None and source.mask.unique().tolist() == [0, 1]
    assert not (changed & ~area).any() and changed[area].float().mean() > 0.8
    alone = draw({key: value[1:2] for key, value in inputs.items()}, [6])
    assert (alone[0].int() - made[1].int()).abs().max() <= 1
    assert not torch.equal(draw(inputs, [8, 6, 7])[0], made[0])


def test_less_strength_changes_less():
    inputs = sources(mask=False)
    changes = []
    for strength in (0.2, 0.5, 1.0):
        draw = generator("ddim", strength)
        seen: list[int] = []
        made = draw(inputs, [5, 6, 7], lambda step, seen=seen: seen.append(step.steps))
        assert seen == [draw.steps] * draw.steps and draw.steps == steps_from(6, strength)
        changes.append((made.int() - inputs[IMAGE].int()).abs().float().mean().item())
    assert changes == sorted(changes) and changes[0] < 0.7 * changes[-1]
    assert [steps_from(*pair) for pair in ((50, 0.8), (20, 0.04), (3, 1.0))] == [40, 0, 3]


def test_the_strip_begins_with_the_state_that_drawing_begins_with():
    inputs, draw = sources(mask=False), generator("ddim", 0.5)
    seen: list[torch.Tensor] = []
    original = draw.model.denoiser.forward
    draw.model.denoiser.forward = lambda x, *args, **more: (seen.append(x), original(x, *args, **more))[1]  # type: ignore
    draw(inputs, [5, 6, 7])
    assert torch.equal(draw.start(inputs, [5, 6, 7]), seen[0])
    assert torch.equal(draw.start(LABELS, [5, 6, 7]), draw.noise([5, 6, 7]))
