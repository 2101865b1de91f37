"""The largest micro-batch that a config allows, as shapes: what a run may need, without reading its data."""

import math
from typing import Any

import torch
from torch import Tensor

from mmlab.data.batch import IGNORE
from mmlab.data.collate import check_room
from mmlab.data.config import ImageDataConfig, ImageTextDataConfig
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import Picture
from mmlab.model.packed_rows import ROWS, takes_masks
from mmlab.stage.autoencoder_training import AutoencoderTraining
from mmlab.stage.code_prior import CodePrior
from mmlab.stage.contrastive import ContrastivePretraining
from mmlab.stage.generative import GenerativeStage
from mmlab.stage.next_token import NextTokenStage
from mmlab.stage.qformer_pretraining import QFormerPretraining
from mmlab.stage.stage import Stage


def largest_batch(stage: Stage, data: Any) -> dict[str, Any] | None:
    """Return a micro-batch of a stage in which every row is as long as it may be, None for a stage of a user's own.

    Texts fill `data.max_length`, each row has a picture (with `anyres` of the most tiles), and every token that may
    have a label has one. A sample of several pictures, or one that is split into several rows, would make it larger.

    Args:
        stage: with its model.
        data: settings of the data.

    Raises:
        ConfigError: rows have no room for text beside an image.
    """
    batch: dict[str, Any] | None = None
    if isinstance(stage, NextTokenStage) and isinstance(data, ImageTextDataConfig):
        batch = _chat(stage, data)
    elif isinstance(stage, GenerativeStage | AutoencoderTraining) and isinstance(data, ImageDataConfig):
        batch = _images(stage, data)
    elif isinstance(data, ImageTextDataConfig) and isinstance(stage, ContrastivePretraining | QFormerPretraining):
        ids = torch.zeros(data.micro_batch, data.max_length, dtype=torch.int64)
        batch = {**_pixels(data.micro_batch, stage.model.vision.image_size), "input_ids": ids}
        batch["attention_mask"] = torch.ones_like(ids)
    return None if batch is None else {**batch, "keys": [str(row) for row in range(data.micro_batch)]}


def supervised_positions(stage: Stage, batch: dict[str, Any]) -> int:
    """The positions of a batch of `largest_batch` that a stage predicts from; 0 for one without tokens to predict."""
    if not isinstance(stage, NextTokenStage):
        return 0
    rows, length = batch["input_ids"].shape
    image = len(batch["image_positions"]) // rows
    return rows * (length - max(1, image))  # the first token of a row is not predicted


def _chat(stage: NextTokenStage, data: ImageTextDataConfig) -> dict[str, Any]:
    rows, length = data.micro_batch, -(-data.max_length // 8) * 8  # rows are padded to a multiple of 8
    image = stage.image(data) if stage.config.prompt.pictures == "tokens" else None
    ids = torch.zeros(rows, length, dtype=torch.int64)
    place = torch.arange(length).expand(rows, -1)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": place, "context_ids": ids, "labels": ids}
    batch["segment_ids"] = torch.ones_like(ids)
    config = stage.model.language.config
    # Our own attention needs as much memory for one text in a row as for several.
    batch["packed"] = data.pack and takes_masks(config) and config._attn_implementation != ROWS
    if image is None:
        return {**batch, **place_pictures([], 0, 0)}
    check_room(image, data)
    batch["labels"] = torch.where(place < image.most_tokens, IGNORE, ids)
    picture = Picture(_pixels(image.most_tiles, image.size)["pixel_values"], torch.zeros(image.most_tokens).long())
    shown = [Shown(picture, row, 0, str(row)) for row in range(rows)]
    return {**batch, **place_pictures(shown, image.tokens, image.size)}


def _images(stage: Any, data: ImageDataConfig) -> dict[str, Any]:
    rows, model = data.micro_batch, stage.model
    batch: dict[str, Any] = {"seeds": list(range(rows))}
    if data.latents:
        side = model.first_stage.side(data.size)
        codes = torch.zeros(rows, side, side, dtype=torch.int64)
        latents = torch.zeros(rows, model.first_stage.channels, side, side)
        batch |= {"codes": codes, "map_codes": codes} if isinstance(stage, CodePrior) else {"mean": latents}
        batch |= {} if isinstance(stage, CodePrior) else {"logvar": latents.clone()}
    if not data.latents or getattr(model, "alignment", None) is not None:
        largest = max(data.shapes, key=math.prod, default=(data.size, data.size))
        batch |= _pixels(rows, *largest)
    if not data.latents and getattr(model, "map_stage", None) is not None:
        batch["map_pixels"] = batch["pixel_values"].clone()
    reads = getattr(getattr(model, "conditioner", None), "reads", "none")
    if reads == "class":
        batch["labels"] = torch.zeros(rows, dtype=torch.int64)
    elif reads == "text":
        ids = torch.zeros(rows, model.conditioner.max_length, dtype=torch.int64)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch


def _pixels(count: int, height: int, width: int | None = None) -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(count, 3, height, width or height, dtype=torch.uint8)}
