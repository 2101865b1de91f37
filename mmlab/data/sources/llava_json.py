"""LLaVA's format: a JSON list of conversations, and a folder with the images that it names."""

from pathlib import Path
from typing import Any

from mmlab.data.dialogues import check_sample, used_turns
from mmlab.data.formats import KeyMaker, Members, record_type
from mmlab.data.sample_types import SampleError
from mmlab.data.shard_files import Samples
from mmlab.data.sources.files import load_entries
from mmlab.data.sources.pictures import ImageFolder
from mmlab.data.tally import Tally
from mmlab.data.turns import IMAGE


def llava_json(path: str | Path, images: str | Path, missing_budget: float = 0.0, kind: str | None = None) -> Samples:
    """Read `[{"id", "image", "conversations": [{"from", "value"}, …]}, …]`; entries without `image` are only text.

    The record keeps an entry's `type`, its response type, and the turns that `used_turns` returns.

    Args:
        path: the file: a JSON list, or JSON lines.
        images: the folder that the entries' `image` paths start from; an absolute path must lie in it.
        missing_budget: share of the entries whose image may be missing or unsupported; such entries are left out.
        kind: response type of the entries without one, such as `conversation` for conversation_58k.json.

    Returns:
        A row for each entry; `text_only`, `renamed` (an id that was used before), `turns_skipped`, `system_messages`,
        and `images_without_marker`, which are shown first, of those that are written. Left out: what training could
        not use (`turns`, `role`, `order`, `empty-answer`, `no-answer`, `no-picture`, …, see `conversations_of`), and
        what `ImageFolder.read` names.

    Raises:
        DataError: a file of another format or encoding, or more lost images than the budget allows.
    """
    tally, keys = Tally("text_only", "renamed", "turns_skipped", "system_messages", "images_without_marker"), KeyMaker()
    entries = list(load_entries(Path(path), tally))
    folder = ImageFolder(images, missing_budget, len(entries), tally)
    for number, (where, entry) in enumerate(entries):
        with tally.row(where):
            turns = _turns(entry)
            name = str(number) if entry.get("id") is None else str(entry["id"])
            record: dict[str, Any] = {"id": name, "conversations": turns}
            if named := record_type(entry) or kind:
                record["type"] = named
            pictured = entry.get("image") not in (None, "", [])
            check_sample(record, ["conversations"], pictured)
            used = record["conversations"] = used_turns(turns)
            members: Members = {"json": record}
            if pictured:
                picture = folder.read(entry["image"], where)
                members[picture.extension] = picture.data
            tally.details["text_only"] += not pictured
            tally.details["turns_skipped"] += len(turns) - len(used)
            tally.details["system_messages"] += used[0]["from"] == "system"
            marked = any(IMAGE in turn["value"] for turn in used if turn["from"] == "human")
            tally.details["images_without_marker"] += pictured and not marked
            key = keys(name)
            tally.details["renamed"] = keys.repeats
            yield key, members
    return tally


def _turns(entry: Any) -> list[dict[str, Any]]:
    """The turns of an entry, with only their two fields."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise SampleError("turns", 'Expected an object with "conversations", a list of {"from": text, "value": text}.')
    return [{"from": turn.get("from"), "value": turn.get("value")} for turn in turns]
