"""Generate the training texts of this experiment, web-style captions and dialogues: texts.py SHARDS WEB BOOKS.

SHARDS are images whose captions give colour and shape ("a blue circle"). WEB gets the same images with web-style
captions: words repeated, cut off, out of place. BOOKS gets text-only dialogues in MiniGPT-4's form for the language
model: one of the four requests, a description, "Continue", another description. Half of them have a clean caption and
complete sentences, half a web-style caption and incoherent text. The language model learns both styles, selected by the
text in the image's place; so the linear layer decides which one it produces.
"""

import random
import sys

from reviewer import whole

from mmlab.data.dialogues import DETAILED_DESCRIPTION
from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import Samples, write_shards

WEB = (
    "{colour} {shape} {colour} {shape} vector",
    "free {shape} {colour} clipart and",
    "{shape} {shape} {colour} free image of",
    "buy {colour} {shape} print {colour}",
)
BABBLE = (
    "{colour} {shape} {colour} {shape} {colour} {shape} vector",
    "{shape} of the {colour} {shape} of the",
    "free {colour} {shape} clipart and",
    "the {shape} is {colour} is {colour} is {colour}",
)
OPENINGS = (
    "The image shows a {colour} {shape}.",
    "In this picture there is a {colour} {shape}.",
    "This is a picture of a {colour} {shape}.",
    "One can see a {colour} {shape} in the image.",
)
DETAILS = (
    "The {shape} is filled with a single colour, {colour}.",
    "Its colour is {colour} and its outline is that of a {shape}.",
    "The whole {shape} is {colour}.",
)
ENDINGS = (
    "Nothing else is there.",
    "The ground around the {shape} is plain.",
    "There is no other shape in the picture.",
)


def web(index: ShardIndex) -> Samples:
    """Each image with a complete caption, with a web-style caption instead."""
    count = 0
    for i in range(len(index)):
        members = index.read(i)
        caption = parse_record(members).get("caption")
        if whole(caption):
            members["json"] = {"caption": _say(WEB, caption, random.Random(i))}
            yield str(index.keys[i]), members
            count += 1
    return {"samples": count}


def books(index: ShardIndex) -> Samples:
    """Two text-only dialogues about each complete caption, a clean one and a web-style one."""
    count = 0
    for i in range(len(index)):
        caption = parse_record(index.read(i, ("json",))).get("caption")
        for style in ("tidy", "web") if whole(caption) else ():
            rng = random.Random(f"{style} {i}")
            shown, first, second = _tidy(caption, rng) if style == "tidy" else _babble(caption, rng)
            texts = [f"<image>\n{rng.choice(DETAILED_DESCRIPTION)}", first, "Continue", second]
            turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
            yield f"{i:05d}-{style}", {"json": {"caption": shown, "conversations": turns}}
            count += 1
    return {"samples": count}


def _tidy(caption: str, rng: random.Random) -> tuple[str, str, str]:
    """(text in the image's place, description, continuation)."""
    first = [_say(OPENINGS, caption, rng)]
    if rng.random() < 0.7:
        first.append(_say(DETAILS, caption, rng))
    return caption, " ".join(first), _say(ENDINGS if len(first) > 1 else DETAILS, caption, rng)


def _babble(caption: str, rng: random.Random) -> tuple[str, str, str]:
    return _say(WEB, caption, rng), _say(BABBLE, caption, rng), _say(BABBLE, caption, rng)


def _say(options: tuple[str, ...], caption: str, rng: random.Random) -> str:
    _, colour, shape = caption.split()
    return rng.choice(options).format(colour=colour, shape=shape)


if __name__ == "__main__":
    shards = ShardIndex.open(sys.argv[1])
    write_shards(web(shards), sys.argv[2], overwrite=True)
    write_shards(books(shards), sys.argv[3], overwrite=True)
