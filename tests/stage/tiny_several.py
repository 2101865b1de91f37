"""Samples with none, one or two pictures of several shapes, and a model that sees them as squares or as tiles."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmlab.data.config import ANYRES, ImageTextDataConfig
from mmlab.data.formats import Members
from mmlab.data.index import ShardIndex
from mmlab.data.module import ShardDataModule
from mmlab.data.shard_files import ShardWriter
from mmlab.model.config import MLPConnectorConfig
from mmlab.model.connector import MLPConnector, Newline
from mmlab.model.vlm import VisionLanguageModel
from mmlab.stage.config import EndToEndFinetuningConfig
from tests.model import tiny
from tests.stage.tiny_stage import QUESTIONS, make_stage
from tests.tiny_files import png
from tests.tiny_shards import sources

GRIDS = [[1, 2], [2, 1], [2, 2]]
TRAINED = ["connector", "newline", "language"]
SHAPES = ((40, 12), (10, 30), (16, 16), (33, 20))
COLORS = ("red", "green", "blue")


def picture(n: int) -> bytes:
    width, height = SHAPES[n % len(SHAPES)]
    return png(width + n, height, COLORS[n % len(COLORS)])


def make_several(root: Path, count: int = 12) -> ShardIndex:
    """Write samples with n % 3 pictures; the second picture of a sample is shown by a later turn."""
    with ShardWriter(root, 5, quiet=True) as writer:
        for n in range(count):
            shown = n % 3
            first = {"question": "<image>" * (shown == 2) + "what color is it?", "answer": COLORS[n % 3]}
            later = {"question": "and this one? <image>" if shown == 2 else "is it big?", "answer": "a square"}
            record = {"questions": [{**first, "follow_ups": [later]}]}
            if shown < 2:  # several questions about one picture share its tokens
                record["questions"].append({"question": "what is shown?", "answer": "a circle"})
            members: Members = {("png", "0.png")[i]: picture(n + i) for i in range(shown)}
            writer.write(f"s{n:03d}", {**members, "json": record})
    return writer.index


def vlm(tokenizer: Path, tongue: str = "llama") -> VisionLanguageModel:
    torch.manual_seed(0)
    connector: Any = partial(MLPConnector, MLPConnectorConfig(depth=2))
    return VisionLanguageModel(tiny.vision(), connector, tiny.language(tokenizer, tongue), newline=Newline).eval()


def tiles_stage(tokenizer: Path, tongue: str = "llama", **options: Any) -> Any:
    """LLaVA's second stage around a model with a newline."""
    config = EndToEndFinetuningConfig(**{"trainable": TRAINED, "prompt": QUESTIONS, **options})
    return make_stage(config, vlm(tokenizer, tongue))


def data_of(stage: Any, shards: Path, aspect: str = ANYRES, **options: Any) -> ShardDataModule:
    batch = {"global_batch": 6, "micro_batch": 3, "seed": 0, "max_length": 120}
    data = ImageTextDataConfig(train=sources(shards), aspect=aspect, grids=GRIDS, **{**batch, **options})
    return ShardDataModule(data, stage.collate(data))
