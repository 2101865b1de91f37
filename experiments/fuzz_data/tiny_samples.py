"""Whole samples that every collate and question can use, and mutated ones."""

import io
import json
from random import Random
from typing import Any

import torch
from mutations import as_json, mutated_bytes, mutated_image, mutated_json, mutated_text
from PIL import Image
from safetensors.torch import save

from mmlab.data.sample_types import ImageSpec

SIDE = 16
CLASSES = ["red", "blue"]


def picture(kind: str, color: str = "red") -> bytes:
    """A small image file of a kind that Pillow names, perhaps with its mode, such as `PNG/RGBA`."""
    file, (name, _, mode) = io.BytesIO(), kind.partition("/")
    Image.new("RGB", (20, 12), color).convert(mode or "RGB").save(file, name)
    return file.getvalue()


PICTURES = {"jpg": ("JPEG", "JPEG/L", "JPEG/CMYK"), "png": ("PNG", "PNG/RGBA", "PNG/P", "PNG/1"), "webp": ("WEBP",)}


def record(number: int) -> dict[str, Any]:
    """A whole record that every collate and question can use."""
    color = CLASSES[number % 2]
    turns = [("human", "<image>\nwhat color is it?"), ("gpt", color), ("human", "is it red?"), ("gpt", "yes, it is")]
    return {
        "id": f"id{number}",
        "caption": f"a {color} thing",
        "captions": [f"a {color} thing", f"something {color}"],
        "class": color,
        "type": "conversation",
        "conversations": [{"from": role, "value": value} for role, value in turns],
        "questions": [
            {"question": "what color?", "answer": color, "type": "color", "answers": [color], "types": ["color"]},
            {"question": "which letter?", "answer": "A", "answers": ["A"], "choices": 3},
        ],
        **{"first_stage": "made", "encoded_as": ImageSpec(SIDE, "crop").form},
    }


def whole(number: int, random: Random) -> dict[str, bytes]:
    """The members of a whole sample."""
    extension = random.choice(list(PICTURES))
    latents = {"codes": torch.zeros(4, 4, dtype=torch.uint16)} if number % 2 else {"mean": torch.zeros(2, 4, 4)}
    return {
        extension: picture(random.choice(PICTURES[extension])),
        "json": json.dumps(record(number)).encode(),
        "txt": b"a red thing",
        "cls": b"red",
        "map.png": picture("PNG"),
        "safetensors": save(latents),
    }


def mutated(number: int, random: Random) -> dict[str, bytes]:
    """The members of a sample, one to three of which are mutated."""
    members = whole(number, random)
    for name in random.sample(list(members), random.randint(1, 3)):
        if name == "json":
            changed = mutated_json(record(number), random)
            members[name] = as_json(changed, random)
        elif name in ("txt", "cls"):
            text = mutated_text(members[name].decode(), random).encode(errors="surrogatepass")
            members[name] = random.choice([text, mutated_bytes(text, random)])
        elif name == "safetensors":
            members[name] = mutated_bytes(members[name], random, random.choice([8, 100, None]))
        else:
            members[name] = mutated_image(members[name], random)
    if random.randrange(5) == 0:
        del members[random.choice(list(members))]
    return members
