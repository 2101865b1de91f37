"""Pictures, and messages that show them, as transformers takes both."""

import io

import numpy as np
from PIL import Image, ImageFilter

from mmlab.data.turns import Turn
from mmlab.export.chat_ids import messages_of


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA").filter(ImageFilter.GaussianBlur(1))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def messages(question: str, image: Image.Image | str, *later: Turn) -> list[dict]:
    name = "url" if isinstance(image, str) else "image"
    content = [{"type": "image", name: image}, {"type": "text", "text": question}]
    roles = {"human": "user", "gpt": "assistant"}
    rest = [{"role": roles[turn.role], "content": [{"type": "text", "text": turn.text}]} for turn in later]
    return [{"role": "user", "content": content}, *rest]


def showing(dialogue: list[Turn], pictures: list[Image.Image]) -> list[dict]:
    """The messages of a dialogue with the pictures that they show, after its system message."""
    asked, rest = messages_of(dialogue), iter(pictures)
    for message in asked:
        for part in [] if isinstance(message["content"], str) else message["content"]:
            part |= {"image": next(rest)} if part["type"] == "image" else {}
    return [{"role": "system", "content": dialogue[0].system}] * bool(dialogue[0].system) + asked
