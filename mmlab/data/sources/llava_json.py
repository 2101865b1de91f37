"""LLaVA's format: a JSON list of conversations, and a folder with the images that it names."""

from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, nearest
from mmlab.data.formats import KeyMaker, Members, record_type
from mmlab.data.shard_files import Samples
from mmlab.data.sources.files import ImageFolder, load_json

_ROLES = ("human", "gpt", "system")


def llava_json(path: str | Path, images: str | Path, missing_budget: float = 0.0, kind: str | None = None) -> Samples:
    """Read `[{"id", "image", "conversations": [{"from", "value"}, …]}, …]`; entries without `image` are only text.

    The record keeps an entry's `type`, its response type.

    Args:
        path: the JSON file.
        images: the folder that the entries' `image` paths start from.
        missing_budget: share of the entries whose image may be missing or unsupported (not JPEG, PNG or WebP); such
            entries are skipped and counted.
        kind: response type of the entries without one, such as `conversation` for conversation_58k.json.

    Returns:
        Counts: `samples`, `text_only`, `missing`, `unsupported`, `renamed` (an id that was used before).

    Raises:
        DataError: a file of another format, a malformed entry (with its position), or more losses than the budget
            allows.
    """
    entries = _load(Path(path))
    folder = ImageFolder(images, missing_budget, len(entries))
    keys = KeyMaker()
    counts = {"samples": 0, "text_only": 0}
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        conversations = _conversation(entry, where)
        name = str(number) if entry.get("id") is None else str(entry["id"])
        record: dict[str, Any] = {"id": name, "conversations": conversations}
        if named := record_type(entry) or kind:
            record["type"] = named
        members: Members = {"json": record}
        if entry.get("image"):
            picture = folder.read(entry["image"], where)
            if picture is None:
                continue
            members[picture[0]] = picture[1]
        else:
            counts["text_only"] += 1
        counts["samples"] += 1
        yield keys(name), members
    return {**counts, "missing": folder.missing, "unsupported": folder.unsupported, "renamed": keys.repeats}


def _load(path: Path) -> list[Any]:
    entries = load_json(path)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} does not have LLaVA's format: a non-empty JSON list of conversations is expected.")
    return entries


def _conversation(entry: Any, where: str) -> list[dict[str, str]]:
    """The turns of an entry, with only their two fields; raises DataError for a malformed entry."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f'{where}: expected an object with a non-empty list "conversations".')
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(field), str) for field in ("from", "value")):
            raise DataError(f'{where}, turn {number}: expected {{"from": text, "value": text}}.')
        if turn["from"] not in _ROLES:
            hint = nearest(turn["from"], _ROLES)
            options = ", ".join(_ROLES)
            raise DataError(f"{where}, turn {number}: '{turn['from']}' is not a speaker.{hint} Options: {options}.")
    return [{"from": turn["from"], "value": turn["value"]} for turn in turns]
