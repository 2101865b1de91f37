"""Random changes of records, texts, images and names, drawn from a `random.Random`."""

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        3,
        0.5,
        1e308,
        10**30,
        "",
        " ",
        "red",
        "\0",
        "\ud83d",
        "\udc00x",
        "😀" * 40,
        "a" * 5000,
    ),
    *([], [[]], {}, ["a.png"], [None], {"from": "gpt"}, [{"from": "human", "value": "<image>"}], {"a": {"b": []}}),
    *(float("nan"), float("inf"), "<image>", "<image>\n<image>", "system", "1e999", "../../etc/passwd", "/etc/passwd"),
]
TEXTS = [
    *(
        "<image>",
        "\n<image>\n",
        "</s>",
        "<s>",
        "<pad>",
        "USER:",
        " ASSISTANT:",
        "###",
        "[INST]",
        "<|im_end|>",
        "\0",
        "\r",
    ),
    *(
        "\u202e",
        "\u0301" * 30,
        "\ufeff",
        "\ud83d",
        "\udfff",
        "😀",
        "漢字",
        "\x1b[31m",
        "{{ bos_token }}",
        "%s",
        "\\ud83d",
    ),
    *(" " * 300, "\u2028", "ﷺ", "\ue000", "\U000e0001", "word " * 800, '"', "</script>"),
]
NAMES = [
    *("._{}", ".{}", "{}.url", "x/{}", "/abs/{}", "../{}", "__MACOSX/{}", "{}.gz", "a.b/{}", "é{}", "{}\n", "{}.bak"),
    *("", "/", ".", "README", "22.05.jpg", "x" * 300 + "{}", "\udcff{}", "{}/", "__meta__/{}", "a//{}", "./{}"),
]


def mutated_json(record: Any, random: Random) -> Any:
    """The record with one to three values replaced, removed, repeated, wrapped, or changed as text."""
    record = deepcopy(record)
    for _ in range(random.randint(1, 3)):
        places = list(_places(record))
        if not places:
            return random.choice(ODD)
        owner, name = random.choice(places)
        how = random.randrange(6)
        if how == 0:
            del owner[name]
        elif how == 1:
            owner[name] = [owner[name]]
        elif how == 2 and isinstance(owner, list):
            owner.insert(random.randrange(len(owner) + 1), deepcopy(owner[name]))
        elif how == 3 and isinstance(owner[name], str):
            owner[name] = mutated_text(owner[name], random)
        elif how == 4 and isinstance(owner, dict):
            owner[random.choice(list(owner) + ["caption", "type", "class", "reference"])] = deepcopy(owner[name])
        else:
            owner[name] = deepcopy(random.choice(ODD))
    return record


def _places(value: Any) -> Any:
    """(list or object, index or name) of each value within a value."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for name, inner in items:
        yield value, name
        yield from _places(inner)


def mutated_text(text: str, random: Random) -> str:
    """The text with something odd in it, a part of it, or nothing."""
    at = random.randrange(len(text) + 1)
    return random.choice([text[:at] + random.choice(TEXTS) + text[at:], text[:at], text * random.randint(2, 40)])


def mutated_bytes(data: bytes, random: Random, within: int | None = None) -> bytes:
    """The bytes with some changed (the first `within` of them), cut, or others put in."""
    changed = bytearray(data)
    end = min(len(changed), within or len(changed))
    how = random.randrange(4)
    if how == 0 or not changed:
        return bytes(changed[: random.randrange(len(changed) + 1)])
    for _ in range(random.randint(1, 8)):
        at = random.randrange(end)
        if how == 1:
            changed[at] = random.randrange(256)
        elif how == 2:
            changed[at : at + random.randint(1, 4)] = random.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
        else:
            changed[at:at] = random.randbytes(random.randint(1, 16))
    return bytes(changed)


def mutated_image(data: bytes, random: Random) -> bytes:
    """The image file with a broken header, other dimensions, broken contents, or no image at all."""
    how = random.randrange(5)
    if how == 0:
        return mutated_bytes(data, random, 64)
    if how == 1 and data[:4] == b"\x89PNG":
        return data[:16] + struct.pack(">II", *(random.choice([0, 1, 9000, 70_000, 2**31]) for _ in "wh")) + data[24:]
    if how == 2:
        return random.choice(
            [b"", b"\xff\xd8\xff", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8X"]
        )
    return mutated_bytes(data, random)


def as_json(record: Any, random: Random) -> bytes:
    """The record as JSON, of which every fourth is broken as text."""
    data = json.dumps(record).encode()
    return mutated_bytes(data, random) if random.randrange(4) == 0 else data
