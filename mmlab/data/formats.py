"""What a shard may contain: extensions, keys, records and their limits. Loads without torch and Pillow."""

import json
import re
from collections.abc import Iterable
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.sample_types import SampleError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAP = "map.png"
"""A second image of the same scene, such as its segmentation in colors or its depth in gray."""
LATENTS = "safetensors"
"""The member with what a first stage made of the image: latents (`mean`, `logvar` unless it is deterministic, float16
or float32 `[C, h, w]`) or codes (`codes`, with a map `map_codes`, uint16 or uint32 `[h, w]`). Names of the tensors of
the mirrored image end in `_flipped`."""
FIRST_STAGE, MAP_STAGE = "first_stage", "map_stage"
"""Fields of the record with the hashes of the first stages that encoded the image and its map."""
ENCODED_AS = "encoded_as"
"""The record's field with the size and aspect of the encoded image, see `ImageSpec.form`."""
MOST_PICTURES = 32
"""The most pictures of a sample: `key.jpg`, `key.0.jpg`, `key.1.jpg`, …, `key.30.jpg`."""
_NUMBERED = tuple(f"{n}.{kind}" for n in range(MOST_PICTURES - 1) for kind in IMAGE_EXTENSIONS)
PICTURES = (*IMAGE_EXTENSIONS, *_NUMBERED)
"""Members that may hold a picture, in the order of a sample's pictures; of several kinds, the first one counts."""
EXTENSIONS = (*IMAGE_EXTENSIONS, "json", "txt", "cls", "npy", LATENTS, MAP, *_NUMBERED)
"""Members that are read; reading them never runs code.

An index refers to them by their position here, so new ones come last.
"""

PIXEL_CAP = 50_000_000
"""An image whose header states more pixels is never decoded."""
SIDE_CAP = 65_535
"""The longest side that is decoded (JPEG's own limit): a resize takes memory for each of its pixels."""
RESPONSE_TYPES = ("conversation", "detail_description", "complex_reasoning")
"""LLaVA's, with the names of its folders of prompts (arXiv 2304.08485, section 3)."""
DEPTH_CAP = 100
"""The deepest nesting of a record: Python's own limit depends on who reads it."""
TYPE_CAP = 64
"""The longest name of a response type; a longer `type` is some other field."""
MEMBER_CAP = 1 << 30
"""The largest member, in bytes."""

Members = dict[str, bytes | str | dict[str, Any]]
"""The members of one sample: extension → bytes, text, or the record (for `json`)."""

_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__(?:$|/)")


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and lower-case extension, at the first dot of its file name.

    This is webdataset's rule: `a.b/c.seg.png` has the key `a.b/c` and the extension `seg.png`. None for a name without
    an extension.
    """
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1], match[2].lower())


def foreign_kind(name: str) -> str | None:
    """What a member is called among those that are not read: its extension, or what left it there; None if it is read.

    Hidden files are not read: macOS writes `._a.jpg` beside `a.jpg`. Nor is webdataset's own `__meta__`.
    """
    *folders, file = name.split("/")
    if "__MACOSX" in folders:
        return "__MACOSX"
    if file.startswith("."):
        return "._*" if file.startswith("._") else file
    if meta := _META.match(name):
        return meta[0].rstrip("/")
    parts = split_name(name)
    if parts is None:
        return "without extension"
    return None if parts[1] in EXTENSIONS else f".{parts[1]}"


def check_key(key: str) -> None:
    """Raise DataError for a key that is unsafe as a path, or that could not be read back from a tar."""
    if key.startswith("/") or ".." in key.split("/"):
        raise DataError(f"key {key!r} points outside its folder; keys are relative paths without '..'.")
    if "\0" in key or foreign_kind(f"{key}.json") is not None or split_name(f"{key}.json") != (key, "json"):
        raise DataError(f"key {key!r} must end in a name without a dot: the first dot starts the extension.")


def check_extension(extension: str, name: str) -> None:
    """Raise DataError unless `extension` is one of `EXTENSIONS`."""
    if extension not in EXTENSIONS:
        single = ", ".join(one for one in EXTENSIONS if one not in _NUMBERED)
        raise DataError(f"member {name!r} is refused: a shard holds {single}, and further pictures as 0.jpg, 1.jpg, ….")


def pictures_among(extensions: Iterable[str]) -> list[str]:
    """The members that hold a sample's pictures, in order: `jpg`, then `0.jpg`, `1.jpg`, …"""
    present = frozenset(extensions)
    chosen: dict[str, str] = {}  # number, empty for the one without → member
    for name in PICTURES:
        if name in present:
            chosen.setdefault(name.rpartition(".")[0], name)
    return list(chosen.values())


def picture_members(pictures: Iterable[tuple[str, bytes]]) -> Members:
    """The members of a sample with these pictures, (extension, bytes) of each: `jpg`, `0.jpg`, `1.jpg`, …"""
    return {f"{n - 1}.{kind}" if n else kind: data for n, (kind, data) in enumerate(pictures)}


def image_kind(data: bytes) -> str | None:
    """The extension that an image's first bytes imply (`jpg`, `png`, `webp`), or None."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


class KeyMaker:
    """Turns arbitrary names into safe, unique keys.

    Attributes:
        repeats: number of names that were not unique.
    """

    def __init__(self):
        self.repeats = 0
        self._used: set[str] = set()
        self._last: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        """Return `name` with unsafe characters replaced, and `-1`, `-2`, … appended to a repeated one."""
        base = re.sub(r"[^A-Za-z0-9_=+@,-]+", "_", name).strip("_")[:200] or "sample"
        key = base
        if key in self._used:
            self.repeats += 1
        while key in self._used:
            self._last[base] = self._last.get(base, 0) + 1
            key = f"{base}-{self._last[base]}"
        self._used.add(key)
        return key


def record_type(record: dict[str, Any]) -> str:
    """The response type of a record (`conversation`, `complex_reasoning`, …), or an empty string."""
    kind = record.get("type")
    # numpy drops a zero character at the end of a text.
    return kind.replace("\0", "").strip() if isinstance(kind, str) and len(kind) <= TYPE_CAP else ""


def question_types(record: dict[str, Any]) -> list[str]:
    """The type of each of a record's `questions` that has one."""
    return [kind for question in _dicts(record.get("questions")) if (kind := record_type(question))]


def record_texts(record: dict[str, Any]) -> list[str]:
    """Every text of a record in order: caption, turns of the conversations, questions and answers."""
    texts = [record.get("caption")]
    for turn in _dicts(record.get("conversations")):
        texts.append(turn.get("value"))
    for question in _dicts(record.get("questions")):
        for one in (question, *_dicts(question.get("follow_ups"))):
            texts += [one.get("question"), one.get("answer")]
    return [text for text in texts if isinstance(text, str) and text]


def parse_record(members: dict[str, bytes]) -> dict[str, Any]:
    """The record of a sample: its `json`, with the caption from `txt` if the JSON has none.

    Python writes a missing number as NaN, which is not JSON; it is read as null.

    Raises:
        SampleError: `json` or `unicode`, see `check_record`; also for JSON that is malformed or not an object, and for
            a text that is not UTF-8.
    """
    try:
        record = json.loads(members["json"], parse_constant=lambda _: None) if "json" in members else {}
    except (ValueError, RecursionError) as error:
        raise SampleError("json", f"Its record does not parse: {error}.") from None
    if not isinstance(record, dict):
        raise SampleError("json", f"Its record does not parse: the JSON is a {type(record).__name__}, not an object.")
    if not record.get("caption") and "txt" in members:
        try:
            record["caption"] = members["txt"].decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SampleError("unicode", f"Its .txt is not UTF-8: {error}.") from None
    check_record(record)
    return record


def check_record(record: dict[str, Any]) -> None:
    """Check that UTF-8 and JSON can hold a record, as tokenizers, files and logs need.

    Raises:
        SampleError: `unicode` for half a surrogate pair, such as the first half of an emoji (`"\\ud83d"`); `json` for a
            number that is not finite, a value that is not JSON, or too many lists within lists.
    """
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError as error:
        half, before = error.object[error.start], error.object[max(0, error.start - 20) : error.start]
        raise SampleError("unicode", f"Its record has half a character, U+{ord(half):X}, after {before!r}.") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise SampleError("json", f"Its record is not JSON: {error}.") from None
    if text.count("[") + text.count("{") > DEPTH_CAP and _depth(record) > DEPTH_CAP:
        raise SampleError("json", f"Its record has lists within lists, more than {DEPTH_CAP} deep.")


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
