"""Chats in the form of OpenAI, as TRL, LLaMA-Factory and transformers read them: messages of text and image parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlab.data.building import Rows
from mmlab.data.formats import record_type
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.chats import DETAILS, Chat, Chats, chat_captions, no_turns, text_or_none
from mmlab.data.sources.files import load_entries
from mmlab.data.sources.pictures import ImageFolder
from mmlab.data.tally import Tally
from mmlab.data.turns import IMAGE

_ROLES = {"user": "human", "assistant": "gpt", "developer": "system", "model": "gpt", "bot": "gpt"}
_REFERENCES = ("image", "url", "path", "image_url", "base64", "data")
_UNREAD = ("videos", "video", "audios", "audio")
_PART, _MARKER = object(), object()
"""An image part that names no image, and a marker in a text: the next one of the images beside the messages."""


def messages(
    path: str | Path,
    images: str | Path | None = None,
    missing_budget: float = 0.0,
    kind: str | None = None,
    captions: str | None = None,
    caption_types: Sequence[str] = (),
    separate: bool = False,
) -> Rows:
    """Read `{"messages": [{"role", "content"}, …], "images": […]}`, a record per line or in a list.

    A message's `content` is text, in which `<image>` may mark an image of `images`, or a list of parts: text, and
    images that they name or that `images` does, in this order. Records may also have `prompt` and `completion` in place
    of `messages`, or `conversations` of `from` and `value`, and a `system` text.

    Args:
        path: the file: JSON lines, or a JSON list.
        images: the folder that paths of images start from; None: the file's. Images may also be in `data:` URLs.
        missing_budget, kind, captions, caption_types, separate: as for `llava_json`.

    Returns:
        A row for each record, as `llava_json`. Also left out: `part` (a video, audio or tool part).

    Raises:
        DataError: as `llava_json`.
    """
    tally = Tally(*DETAILS)
    folder = ImageFolder(Path(path).expanduser().parent if images is None else images)
    chats = Chats(chat_of, folder, kind, chat_captions(captions), caption_types, separate)
    return chats.rows(Path(path), load_entries(Path(path), tally), tally, missing_budget)


def chat_of(entry: Any) -> Chat:
    """A record in any of these forms.

    Raises:
        SampleError: `turns` for a record without messages, `part`.
    """
    listed = _messages(entry)
    if unread := next((name for name in _UNREAD if entry.get(name)), None):
        raise SampleError("part", f"It has {unread}; only texts and images are read.")
    turns, shown = [], []
    for message in listed:
        role = message.get("role", message.get("from"))
        text, images = _content(message.get("content", message.get("value")))
        turns.append({"from": _ROLES.get(role, role) if isinstance(role, str) else role, "value": text})
        shown += images if turns[-1]["from"] == "human" else [image for image in images if image is not _MARKER]
    if isinstance(system := entry.get("system"), str) and system.strip() and turns[0]["from"] != "system":
        turns.insert(0, {"from": "system", "value": system})
    beside = entry.get("images") if entry.get("images") is not None else entry.get("image")
    beside = beside if isinstance(beside, list) else [] if beside in (None, "") else [beside]
    return Chat(turns, _named(shown, beside), text_or_none(entry.get("id")), record_type(entry))


def _named(shown: list[Any], beside: list[Any]) -> list[Any]:
    """The images of a record in the order of their markers; those `beside` the messages fill what names none."""
    named = [image for image in shown if image is not _PART and image is not _MARKER]
    rest = iter([image for image in beside if image not in named])
    images = [next(rest, image) if image is _PART or image is _MARKER else image for image in shown]
    if _PART in images:
        raise SampleError("no-picture", f"Image {images.index(_PART) + 1} of its messages is not named.")
    return [image for image in images if image is not _MARKER] + list(rest)


def _messages(entry: Any) -> list[dict[str, Any]]:
    lists = []
    if isinstance(entry, dict):
        parts = ("prompt", "completion") if isinstance(entry.get("prompt"), list) else ()
        lists = [[one for name in parts for one in entry.get(name) or []]]
        lists += [entry.get(name) for name in ("messages", "conversations")]
    listed = next((one for one in lists if one), None)
    if not isinstance(listed, list) or not all(isinstance(message, dict) for message in listed):
        raise no_turns('"messages", a list of {"role": text, "content": text or parts}')
    return listed


def _content(content: Any) -> tuple[str, list[Any]]:
    """(text with a marker where an image is; for each marker, the image that its part names, `_PART` or `_MARKER`).

    Texts of several parts are joined as chat templates do; a marker has a line of its own.
    """
    if not isinstance(content, list):
        return content, [_MARKER] * (content.count(IMAGE) if isinstance(content, str) else 0)
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or (isinstance(part, dict) and kind in (None, "text", "input_text")):
            piece = part if isinstance(part, str) else part.get("text") or part.get("content") or ""
            if not isinstance(piece, str):
                raise SampleError("part", f"A part of a message has a text that is not text: {piece!r:.100}.")
            text += ("\n" if text.endswith(IMAGE) else "") + piece
            images += [_MARKER] * piece.count(IMAGE)
        elif kind in ("image", "image_url", "input_image"):
            image = _named_by(part)
            images.append(_PART if image is None else image)
            text += ("\n" if text and not text.endswith("\n") else "") + IMAGE
        else:
            raise SampleError("part", f"A part of a message is {kind!r}; texts and images are read.")
    return text, images


def _named_by(part: dict[str, Any]) -> Any:
    """What names the image of a part, or None."""
    for name in _REFERENCES:
        value = part.get(name)
        value = value.get("url") if name == "image_url" and isinstance(value, dict) else value
        if isinstance(value, dict):  # a column of images in a `datasets` repository
            return value if value.get("bytes") else value.get("path") or None
        if value:
            return f"data:;base64,{value}" if name in ("base64", "data") and isinstance(value, str) else value
    return None
