"""Stand-in for a human reviewer, using the review page's own requests: reviewer.py ADDRESS SHARDS.

It knows a training image from its questions. It accepts a description that names the right color and shape and no
other, edits one wrong word, and rejects everything else.
"""

import json
import re
import sys
from urllib.request import Request, urlopen

from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.sources.easy_vqa import COLORS, SHAPES
from mmlab.evaluate.scores.incoherence import words_of


def whole(caption: str | None) -> bool:
    """Whether a caption has color and shape; for one image in ten the questions do not give both."""
    words = (caption or "").split()
    return len(words) == 3 and words[1] in COLORS and words[2] in SHAPES


def right(text: str, caption: str) -> bool:
    """Whether a text names the color and shape of a complete caption, and no other."""
    _, color, shape = caption.split()
    return [set(words_of(text)) & set(known) for known in (COLORS, SHAPES)] == [{color}, {shape}]


def decided(text: str, caption: str) -> tuple[str, str]:
    """(action, text) for the description of an image with a complete caption."""
    if right(text, caption):
        return "accept", text
    mended = text
    for known, word in zip((COLORS, SHAPES), caption.split()[1:], strict=True):
        named = set(words_of(text)) & set(known)
        if len(named) == 1 and named != {word}:
            mended = re.sub(rf"\b{named.pop()}\b", word, text)
    return ("edit", mended) if right(mended, caption) else ("reject", text)


def main(address: str, shards: str) -> None:
    index = ShardIndex.open(shards)
    place = {str(key): i for i, key in enumerate(index.keys)}

    def ask(path: str, said: dict | None = None) -> dict:
        data = None if said is None else json.dumps(said).encode()
        with urlopen(Request(address + path, data, {"Content-Type": "application/json"})) as reply:
            return json.load(reply)

    for i in range(ask("state")["total"]):
        item = ask(f"item/{i}")
        if item["action"] is None:
            caption = parse_record(index.read(place[item["key"]], ("json",))).get("caption")
            action, text = decided(item["text"], caption) if whole(caption) else ("reject", item["text"])
            ask(
                "decide",
                {**{name: item[name] for name in ("i", "key", "proposed", "seen")}, "action": action, "text": text},
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
