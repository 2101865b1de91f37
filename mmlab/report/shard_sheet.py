"""A contact sheet of a set of shards, as shown by `mmlab shards show`."""

from PIL import Image

from mmlab.data.bad_samples import sample_errors
from mmlab.data.formats import parse_record, pictures_among
from mmlab.data.images import load_rgb
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import SampleError
from mmlab.data.subsets import shown
from mmlab.report.contact_sheet import CARD, contact_sheet


def sample_sheet(index: ShardIndex, count: int, columns: int = 4) -> Image.Image:
    """`count` samples spread over the set, with key, class, caption, questions and conversation.

    Unreadable parts are named on the sheet.
    """
    chosen = shown(index, count)
    cards = [_card(index, i) for i in chosen]
    pictures, texts = zip(*cards, strict=True)
    title = f"{index.root.resolve().name}: {len(chosen)} of {len(index)} samples"
    return contact_sheet(pictures, texts, columns, labels=[str(index.keys[i]) for i in chosen], title=title)


def _card(index: ShardIndex, i: int) -> tuple[Image.Image | None, str]:
    try:
        members = index.read(i)
    except SampleError as error:
        return None, str(error)
    pictures, lines, names = [], [], pictures_among(members)
    for name in names:
        try:
            pictures.append(load_rgb(members[name]))
        except Exception as error:  # Pillow's parsers raise nearly anything on broken bytes
            lines.append(f"unreadable image: {error}")
    try:
        with sample_errors():
            lines += _lines(parse_record(members), len(names))
    except SampleError as error:
        lines.append(f"unreadable record: {error}")
    return _beside(pictures), "\n".join(lines)


def _beside(pictures: list[Image.Image]) -> Image.Image | None:
    """Pictures beside each other, of the same height."""
    if len(pictures) < 2:
        return pictures[0] if pictures else None
    height = max(picture.height for picture in pictures)
    fitted = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in pictures]
    gap = max(1, height // 16)
    sheet = Image.new("RGB", (sum(one.width + gap for one in fitted) - gap, height), CARD)
    left = 0
    for one in fitted:
        sheet.paste(one, (left, 0))
        left += one.width + gap
    return sheet


def _lines(record: dict, pictures: int) -> list[str]:
    lines = [f"class: {record['class']}"] if record.get("class") is not None else []
    lines += [f"“{record['caption']}”"] if record.get("caption") else []
    for item in record.get("questions") or ():
        for one in (item, *(item.get("follow_ups") or ())):
            lines.append(f"{one['question']} → {one['answer']}")
    for turn in () if record.get("questions") else record.get("conversations") or ():
        speaker = {"human": "Q", "gpt": "A"}.get(turn["from"], turn["from"])
        text = turn["value"] if pictures > 1 else turn["value"].replace("<image>", "")
        lines.append(f"{speaker}: {text.strip()}")
    return lines
