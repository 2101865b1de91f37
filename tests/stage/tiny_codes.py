"""Priors small enough to be trained in a second, and their data: pictures with maps, and the codes of the same ones."""

import io
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter, write_shards
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.stage.config import CodePriorConfig
from mmlab.stage.latent_cache import codes
from tests.model.tiny_priors import NAMES, prior_model
from tests.stage.tiny_diffusion import image_data
from tests.stage.tiny_stage import make_stage

SIZE = 16
code_data = partial(image_data, size=SIZE)


def code_stage(model: CodePriorModel | None = None, **options: Any) -> Any:
    model = model or prior_model("class")
    trainable = ["prior"] if model.conditioner.reads == "none" else ["prior", "conditioner"]
    return make_stage(CodePriorConfig(**{"trainable": trainable, **options}), model)


def make_maps(root: Path, count: int = 16, split: str = "s", size: int = SIZE) -> ShardIndex:
    """Pictures of three colours, each with a class, a caption and a map of where the colours are."""
    with ShardWriter(root / split, 6, quiet=True) as writer:
        for i in range(count):
            members = {name: _png(i, size, name == "map.png") for name in ("png", "map.png")}
            record = {"class": NAMES[i % 3], "caption": f"a {NAMES[i % 3]} number {i}"}
            writer.write(f"{split}{i}", {**members, "json": record})
    return writer.index


def make_codes(root: Path, model: CodePriorModel, index: ShardIndex, **options: Any) -> ShardIndex:
    """The same samples as `mmlab shards encode` writes them."""
    spec = ImageSpec(model.prior.side * model.first_stage.factor, "crop")
    found = codes(model.first_stage, index, spec, map_stage=model.map_stage, **options)
    return write_shards(found, root / index.root.name, 6, quiet=True)[0]


def _png(i: int, size: int, flat: bool) -> bytes:
    picture = Image.new("RGB", (size, size), (255, 0, 0) if flat else (15 * i % 256, 90, 40))
    half, quarter = size // 2, size // 4
    picture.paste((0, 255, 0) if flat else (10, 15 * i % 256, 200), (0, 0, half, size))
    picture.paste((0, 0, 255) if flat else (200, 200, 17 * i % 256), (i % half, quarter, i % half + half, half))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
