"""LLaVA's format: a JSON list of conversations, and a folder with the images that it names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlab.data.building import Rows
from mmlab.data.formats import record_type
from mmlab.data.sources.chats import DETAILS, Chat, Chats, chat_captions, no_turns, text_or_none
from mmlab.data.sources.files import load_entries
from mmlab.data.sources.pictures import ImageFolder
from mmlab.data.tally import Tally


def llava_json(
    path: str | Path,
    images: str | Path,
    missing_budget: float = 0.0,
    kind: str | None = None,
    captions: str | None = None,
    caption_types: Sequence[str] = (),
    separate: bool = False,
) -> Rows:
    """Read `[{"id", "image", "conversations": [{"from", "value"}, …]}, …]`; entries without `image` are only text.

    `image` names one image, or as a list several. Entries about the same images make one sample with `questions`; a
    single one keeps its `conversations`. Both keep the entries' types and the turns that `used_turns` returns.

    Args:
        path: the file: a JSON list, or JSON lines.
        images: the folder that the entries' `image` paths start from; an absolute path must lie in it.
        missing_budget: share of the entries whose image may be missing or unsupported; such entries are left out.
        kind: response type of the entries without one, such as `conversation` for conversation_58k.json.
        captions: `from-first-answer` of entries that are captions, or a table of captions of the images.
        caption_types: further types of entries that are captions.
        separate: make a sample of each entry.

    Returns:
        A row for each entry; `text_only`, `renamed` (an id that was used before), `turns_skipped`, `system_messages`,
        and `images_without_marker`, which are shown first, of those that are written. Left out: what training could
        not use (`turns`, `role`, `order`, `empty-answer`, `no-answer`, `no-picture`, …, see `conversations_of`), and
        what `ImageFolder.read` names.

    Raises:
        DataError: a file of another format or encoding, more lost images than the budget allows, or no caption.
    """
    tally = Tally(*DETAILS)
    chats = Chats(_parse, ImageFolder(images), kind, chat_captions(captions), caption_types, separate)
    return chats.rows(Path(path), load_entries(Path(path), tally), tally, missing_budget)


def _parse(entry: Any) -> Chat:
    """An entry with only the two fields of each turn."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        other = isinstance(entry, dict) and "messages" in entry
        hint = " Records with messages are read by `mmlab shards build messages`." if other else ""
        raise no_turns('"conversations", a list of {"from": text, "value": text}', hint)
    image = entry.get("image", entry.get("images"))
    images = [] if image in (None, "", []) else image if isinstance(image, list) else [image]
    turns = [{"from": turn.get("from"), "value": turn.get("value")} for turn in turns]
    return Chat(turns, images, text_or_none(entry.get("id")), record_type(entry))
