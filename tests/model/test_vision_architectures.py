"""Every vision tower of transformers: one token for each position, row by row, of that image alone; or refused."""

from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from mmlab.config.errors import ConfigError
from mmlab.model.config import VisionEncoderConfig
from mmlab.model.vision import VisionEncoder
from tests.model import tiny

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 1, 2, 2]}
WINDOWS = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "window_size": 4, "image_size": 64}
# Type → (fields, tokens before the grid). All have 16 positions.
LAYERED: dict[str, tuple[dict[str, Any], int]] = {
    "aimv2_vision_model": ({}, 0),
    "altclip_vision_model": ({}, 1),
    "beit": ({}, 1),
    "blip_vision_model": ({}, 1),
    "chinese_clip_vision_model": ({}, 1),
    "data2vec-vision": ({}, 1),
    "deit": ({}, 2),
    "dinov2": ({"mlp_ratio": 2}, 1),
    "dinov2_with_registers": ({"mlp_ratio": 2, "num_register_tokens": 4}, 5),
    "dinov3_vit": ({"num_register_tokens": 4}, 5),
    "dpt": ({}, 1),
    "git_vision_model": ({}, 1),
    "ijepa": ({}, 0),
    "internvl_vision": ({"image_size": [32, 32], "patch_size": [8, 8]}, 1),
    "metaclip_2_vision_model": ({}, 1),
    "mlcd_vision_model": ({}, 1),
    "owlvit_vision_model": ({}, 1),
    "pixio": ({"n_cls_tokens": 4}, 4),
    "pixtral": ({}, 0),
    "radio": ({}, 10),
    "siglip_vision_model": ({}, 0),
    "siglip2_vision_model": ({"num_patches": 16}, 0),
    "tipsv2_vision_model": ({}, 2),
    "vit": ({}, 1),
    "vit_msn": ({}, 1),
}
# Type → (fields, pixels, positions).
STAGED: dict[str, tuple[dict[str, Any], int, int]] = {
    "bit": (STAGES | {"embedding_size": 8, "num_groups": 2}, 64, 4),
    "convnext": (STAGES, 64, 4),
    "convnextv2": (STAGES, 64, 4),
    "cvt": ({"embed_dim": [8, 16, 32], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}, 64, 16),
    "dinov3_convnext": (STAGES, 64, 4),
    "donut-swin": (WINDOWS, 64, 16),
    "efficientnet": ({"depth_coefficient": 0.1, "width_coefficient": 0.25, "hidden_dim": 320}, 64, 4),
    "focalnet": ({"embed_dim": 8, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3]}, 64, 64),
    "glpn": (PYRAMID, 64, 4),
    "hiera": ({"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}, 224, 49),
    "levit": ({"hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]}, 224, 16),
    "maskformer-swin": (WINDOWS, 64, 16),
    "mobilenet_v1": ({"depth_multiplier": 0.25}, 96, 9),
    "mobilenet_v2": ({"depth_multiplier": 0.25}, 96, 9),
    "poolformer": (STAGES, 64, 4),
    "pvt": (PYRAMID | {"image_size": 64}, 64, 4),
    "pvt_v2": (PYRAMID, 64, 4),
    "regnet": (STAGES | {"embedding_size": 8, "groups_width": 8}, 64, 4),
    "resnet": (STAGES | {"embedding_size": 8}, 64, 4),
    "sam_vision_model": (
        {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "output_channels": 16,
         "image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48}, 64, 16,
    ),
    "segformer": (PYRAMID, 64, 4),
    "swiftformer": ({"embed_dims": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}, 64, 4),
    "swin": (WINDOWS, 64, 16),
    "swinv2": (WINDOWS, 64, 16),
    "vitdet": ({"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "image_size": 64}, 64, 16),
}  # fmt: skip
REFUSED: dict[str, str] = {
    "vit_mae": "encodes only a random quarter of the patches",
    "yolos": "its last tokens are detections",
    "maskformer": "its tokens are the queries of a decoder",
    "glm_image_vision": "it needs grid_thw beside the pixels",
    "seggpt": "it needs prompt_pixel_values, prompt_masks beside the pixels",
    "videomae": "does not encode an image of 32 px",
    "smolvlm_vision": "does not encode an image of 32 px",
    "rt_detr": "it has a decoder",
    "timm_wrapper": "because TimmWrapperModel requires the timm library but it was not found in your environment.$",
    "llama": "it takes other inputs than the pixels of an image",
    "bridgetower_vision_model": "transformers has no model of type 'bridgetower_vision_model' for images alone",
}


def small(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The architecture of a small tower, without dropout."""
    config = CONFIG_MAPPING[kind]()
    default, alias = config.to_dict(), config.attribute_map
    plain = {name: value for name, value in SMALL.items() if name in default and alias.get(name) not in SMALL}
    size = {name: value for name, value in plain.items() if not isinstance(default[name], list | tuple)}
    return {"model_type": kind, **(size if kind not in STAGED else {}), **fields}


def encoder(kind: str, fields: dict[str, Any], **options: Any) -> VisionEncoder:
    """An encoder whose every weight matters, also after many layers."""
    torch.manual_seed(0)
    tower = VisionEncoder(VisionEncoderConfig(init="random", architecture=small(kind, fields), **options)).eval()
    for norm in (each for each in tower.modules() if isinstance(each, torch.nn.BatchNorm2d) and kind == "efficientnet"):
        torch.nn.init.constant_(norm.weight, 2.0)
    for name, weight in tower.named_parameters():
        if weight.dim() > 1 and "position" not in name:
            torch.nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
        elif "lambda" in name or "scale" in name.lower():
            torch.nn.init.constant_(weight, 0.5)
    return tower


def images(tower: VisionEncoder, count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, tower.image_size, tower.image_size), dtype=torch.uint8)


def alike(features: Tensor, others: Tensor) -> bool:
    return torch.allclose(features, others, atol=1e-4 * float(others.abs().max()))


def rows_are_images(tower: VisionEncoder) -> None:
    """An image's features do not depend on the image beside it."""
    pixels = images(tower)
    both = tower(pixels)
    assert both.shape == (2, tower.tokens_per_image, tower.width) and both.abs().max() > 1e-6
    assert alike(tower(pixels[1:]), both[1:])


def positions_are_in_reading_order(tower: VisionEncoder) -> None:
    """They are those of the tower's map, or a change of one cell changes the features at its position most."""
    pixels = images(tower)
    if not tower._layers_name:
        output = tower.tower((pixels - tower.mean) / tower.std).last_hidden_state
        if output.dim() == 4:
            side = isqrt(tower.tokens_per_image)
            assert tower(pixels).view(2, side, side, tower.width).permute(0, 3, 1, 2).equal(output)
            return
    side = isqrt(tower.tokens_per_image)
    cell = tower.image_size // side
    plain = torch.full((1, 3, tower.image_size, tower.image_size), 128, dtype=torch.uint8)
    before = tower(plain)
    for row, column in ((0, side - 1), (side - 1, 0)):
        changed = plain.clone()
        changed[..., row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 255
        change = (tower(changed) - before)[0].norm(dim=1)
        assert int(change.argmax()) == row * side + column, (row, column, change.view(side, side))


def unused_weights_are_those_without_a_gradient(tower: VisionEncoder) -> None:
    tower(images(tower)).square().sum().backward()
    names = {weight: name for name, weight in tower.named_parameters()}
    assert sorted(names[weight] for weight in tower.unused()) == sorted(
        name for weight, name in names.items() if weight.grad is None
    )


def a_saved_tower_is_the_same(tower: VisionEncoder, folder: Path, **options: Any) -> None:
    tower.save(folder)
    again = tiny.pretrained(VisionEncoder(VisionEncoderConfig(source=str(folder), **options)))
    pixels = images(tower)
    assert alike(again(pixels), tower(pixels))


@pytest.mark.parametrize("kind", LAYERED)
def test_a_tower_of_layers_gives_its_patches(kind, tmp_path):
    fields, prefix = LAYERED[kind]
    tower = encoder(kind, fields)
    assert (tower.tokens_per_image, tower.width, tower.prefix) == (16, 32, prefix)
    assert (tower.feature_layer, len(tower.unused_layers), tower.image_size) == (-2, 1, 32)
    unused_weights_are_those_without_a_gradient(tower)
    with torch.no_grad():
        rows_are_images(tower)
        positions_are_in_reading_order(tower)
        a_saved_tower_is_the_same(tower, tmp_path)


@pytest.mark.parametrize("kind", STAGED)
def test_a_tower_of_stages_gives_its_last_map(kind, tmp_path):
    fields, pixels, positions = STAGED[kind]
    tower = encoder(kind, fields, image_size=pixels)
    assert (tower.tokens_per_image, tower.image_size, tower.feature_layer) == (positions, pixels, -1)
    assert tower.prefix == (kind in ("pvt", "dinov3_convnext")) and not tower.unused_layers
    unused_weights_are_those_without_a_gradient(tower)
    with torch.no_grad():
        rows_are_images(tower)
        if kind != "levit":  # its random attention mixes positions evenly
            positions_are_in_reading_order(tower)
        a_saved_tower_is_the_same(tower, tmp_path, image_size=pixels)


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_by_name(kind):
    with pytest.raises(ConfigError, match=REFUSED[kind]) as error:
        VisionEncoder(VisionEncoderConfig(init="random", architecture=small(kind, {}), image_size=32))
    assert kind in str(error.value) and "\n" not in str(error.value)
