"""What the web and the books are in this small world: texts.py SHARDS WEB BOOKS.

SHARDS are pictures whose captions tell colour and shape ("a blue circle"). WEB gets the same pictures with captions as
the web has them: words repeated, broken off, out of place. BOOKS gets dialogues in MiniGPT-4's form without pictures,
for the language model: one of the four requests, a description, "Continue", another one. Half of them are about a tidy
caption and in whole sentences, half about one of the web's and babble as it does. The language model learns both, and
that what stands in the picture's place says which; so it is up to the linear layer.
"""

import random
import sys

from reviewer import whole

from mmlab.data.dialogues import DETAILED_DESCRIPTION
from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.shards import Samples, write_shards

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
    """Each picture whose caption is whole, with a caption of the web's."""
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
    """Two dialogues about each whole caption, a tidy one and one of the web's, without its picture."""
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
    """(what stands in the picture's place, the description, how it goes on)."""
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
