"""Processors of transformers that prepare pictures and prompts as a run does."""

from math import isqrt
from typing import Any

from PIL import Image

from mmlab.data.config import ANYRES
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import IMAGE


def image_processor(spec: ImageSpec, mean: list[float], std: list[float]) -> Any:
    """Return transformers' image processor that makes squares of pictures as `spec.aspect` does.

    Each is the one whose order of steps is ours: `stretch` only resizes, `crop` crops and then resizes, `pad` resizes
    and then pads, `anyres` makes a base view and tiles. Pillow and torch round differently, by at most 2 of 255.
    """
    import transformers as library

    square = {"height": spec.size, "width": spec.size}
    options = {"size": square, "resample": Image.Resampling.BICUBIC, "image_mean": mean, "image_std": std}
    name, own = {
        "stretch": ("CLIPImageProcessor", {"do_center_crop": False, "crop_size": square}),
        "crop": ("PerceiverImageProcessor", {"crop_size": square}),
        "pad": ("DeepseekVLImageProcessor", {"min_size": 1}),
        ANYRES: (
            "LlavaNextImageProcessor",
            {"do_center_crop": False, "crop_size": square, "image_grid_pinpoints": grid_pixels(spec)},
        ),
    }[spec.aspect]
    return getattr(library, f"{name}Pil")(**options, **own, do_convert_rgb=True)


def grid_pixels(spec: ImageSpec) -> list[list[int]]:
    """Height and width of each grid of tiles in pixels, as transformers has `image_grid_pinpoints`."""
    return [[rows * spec.size, columns * spec.size] for rows, columns in spec.grids]


def llava_processor(strategy: str, images: Any, tokenizer: Any, spec: ImageSpec, template: str) -> Any:
    """Return a LlavaProcessor, or with `anyres` a LlavaNextProcessor: one token for a picture in a text becomes many.

    Also for BLIP-2, whose own processor has no chat template and puts the picture in front of the text.

    Args:
        strategy: `vision_feature_select_strategy` of the model.
        images: the image processor.
        tokenizer: with the picture's token.
        spec: with P, the number of tokens of a square.
        template: the chat template.
    """
    from transformers import LlavaNextProcessor, LlavaProcessor

    # P is stated as a grid of patches and a number of further tokens, of which "default" drops one.
    side, grid = spec.size, isqrt(spec.tokens)
    patch = side // grid if grid * grid == spec.tokens and side // (side // grid) == grid else side
    return (LlavaNextProcessor if spec.aspect == ANYRES else LlavaProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=spec.tokens - (side // patch) ** 2 + int(strategy == "default"),
        image_token=IMAGE,
        chat_template=template,
    )
