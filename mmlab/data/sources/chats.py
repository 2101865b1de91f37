"""Records of dialogues about images, in whatever form: those about the same images become one sample."""

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError
from mmlab.data.building import Entry, Rows
from mmlab.data.dialogues import REQUESTS, check_sample
from mmlab.data.formats import Members, picture_members
from mmlab.data.record_turns import question_of, used_turns
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.pictures import ImageFolder, Picture
from mmlab.data.sources.tables import IMAGE_FIELDS, column, rows
from mmlab.data.tally import Tally
from mmlab.data.turns import IMAGE

FROM_FIRST_ANSWER = "from-first-answer"
DETAILS = ("text_only", "turns_skipped", "system_messages", "images_without_marker", "records_joined")
_CAPTION_FIELDS = ("caption", "captions", "text", "title")
_CAPTION_TYPE = re.compile("caption|descri", re.IGNORECASE)
_PICTURE = "image|picture|photo(graph)?|scene|visual content"
_THING = rf"(the|this|an?|given|following|provided|subsequent|{_PICTURE}|of|what|you see)"
_ASKS = re.compile(
    rf"(please |(can|could|would) you (please )?)?(briefly |concisely )?"
    rf"(describe|caption|summarize|summarise|(write|give|provide|generate)( me)?( an?| the)?( \w+)? "
    rf"(caption|description|summary)( of| for)?)( {_THING})*( briefly| concisely| in (detail|brief|short)"
    rf"| in (one|a) (sentence|few words|short sentence))?\s*[.?!:]*",
    re.IGNORECASE,
)
"""A request for a caption."""


@dataclass(frozen=True)
class Chat:
    """One record: turns from `human`, `gpt` and perhaps first from `system`, what names its images, its id and type.

    `skipped` counts turns that are not used.
    """

    turns: list[dict[str, Any]]
    images: list[Any]
    name: str | None = None
    type: str = ""
    skipped: int = 0


@dataclass
class Chats:
    """What makes samples of records.

    Attributes:
        parse: makes a `Chat` of a record; raises SampleError.
        folder: of the images.
        kind: type of the records without one.
        captions: `FROM_FIRST_ANSWER`, captions by the path of their image, or None for no captions.
        caption_types: further types of records whose first answer is a caption.
        separate: make a sample of each record.
    """

    parse: Callable[[Any], Chat]
    folder: ImageFolder
    kind: str | None = None
    captions: str | Mapping[str, Sequence[str]] | None = None
    caption_types: Sequence[str] = ()
    separate: bool = False

    def rows(self, path: Path, entries: Iterable[Entry], tally: Tally, missing_budget: float) -> Rows:
        """The records of a file; `entries` has each with its number."""

        def finish(tally: Tally) -> None:
            if self.captions == FROM_FIRST_ANSWER and not tally.details["captions"]:
                types = sorted(name.removeprefix("type ") for name in tally.details if name.startswith("type "))
                seen = f" the types are {', '.join(types)};" if types else ""
                raise DataError(
                    f"{path} has no record that is a caption (its type says caption or description, or its first "
                    f"question asks for one);{seen} name the type with --caption-type, or give --captions FILE."
                )

        return Rows(entries, self.convert, tally, missing_budget, group=self.grouped, finish=finish)

    def grouped(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """Records about the same images together, at the place of the first."""
        groups: dict[Any, list[tuple[str, int, Any]]] = {}
        for number, (where, entry) in enumerate(entries):
            name = None if self.separate else _shared(self.parse, entry)
            groups.setdefault(number if name is None else name, []).append((where, number, entry))
        for group in groups.values():
            yield group[0][0], group

    def convert(self, _: str, group: list[tuple[str, int, Any]], tally: Tally) -> tuple[str, Members] | None:
        """Make the sample of records about the same images, or of one without."""
        pictures: list[Picture] = []
        chats: list[Chat] = []
        for where, number, entry in group:
            with tally.row(where):
                chat = self._checked(self.parse(entry), number)
                if chat.images and not pictures:
                    pictures = self.folder.read_all(chat.images, where, tally)
                self._count(chat, tally)
                chats.append(chat)
        if not chats:
            return None
        tally.details["records_joined"] += len(chats) - 1
        if len(pictures) > 1:
            tally.details["several_images"] += 1
        record: dict[str, Any] = {"id": chats[0].name}
        if len(chats) == 1:
            record["conversations"] = chats[0].turns
        else:
            record["questions"] = [
                {"id": chat.name, **question_of(chat.turns, len(pictures))} | ({"type": chat.type} if chat.type else {})
                for chat in chats
            ]
        if len({chat.type for chat in chats}) == 1 and chats[0].type:
            record["type"] = chats[0].type
        if len(pictures) == 1:  # a caption is of one image
            self._add_captions(record, chats, pictures[0], tally)
        shown = picture_members((picture.extension, picture.data) for picture in pictures)
        return str(chats[0].name), {"json": record, **shown}

    def _checked(self, chat: Chat, number: int) -> Chat:
        """A record with only the turns that are used."""
        check_sample(
            {"id": chat.name, "type": chat.type, "conversations": chat.turns}, ["conversations"], len(chat.images)
        )
        name, kind = str(number) if chat.name is None else chat.name, chat.type or self.kind or ""
        used = used_turns(chat.turns)
        return Chat(used, chat.images, name, kind, len(chat.turns) - len(used))

    def _count(self, chat: Chat, tally: Tally) -> None:
        tally.details["text_only"] += not chat.images
        tally.details["turns_skipped"] += chat.skipped
        tally.details["system_messages"] += chat.turns[0]["from"] == "system"
        marked = any(IMAGE in turn["value"] for turn in chat.turns if turn["from"] == "human")
        tally.details["images_without_marker"] += bool(chat.images) and not marked
        if chat.type:
            tally.details[f"type {chat.type}"] += 1

    def _add_captions(self, record: dict[str, Any], chats: Sequence[Chat], picture: Picture, tally: Tally) -> None:
        if self.captions is None:
            return
        if isinstance(self.captions, str):
            texts = [text for chat in chats if (text := self._caption_in(chat)) is not None]
        else:
            texts = list(self.captions.get(os.path.normpath(picture.name), ()))
        texts = list(dict.fromkeys(texts))
        if texts:
            record["caption" if len(texts) == 1 else "captions"] = texts[0] if len(texts) == 1 else texts
        tally.details["captions"] += len(texts)
        tally.details["images_without_caption"] += not texts

    def _caption_in(self, chat: Chat) -> str | None:
        """The first answer of a record that is a caption."""
        item = question_of(chat.turns, 1)
        asks = not item["question"] or item["question"] in REQUESTS["llava"] + REQUESTS["minigpt4"]
        named = chat.type in self.caption_types or _CAPTION_TYPE.search(chat.type) is not None
        return item["answer"].strip() if named or asks or _ASKS.fullmatch(item["question"]) else None


def _shared(parse: Callable[[Any], Chat], entry: Any) -> Hashable:
    """What records about the same images have in common; None for a record without any, or that will be left out."""
    try:
        images = parse(entry).images
    except Exception:  # it is counted where it is converted
        return None
    names = [_normal(image) for image in images]
    return None if not names or None in names else tuple(names)


def _normal(image: Any) -> str | None:
    """The path or id of an image in one of its spellings; None for another kind of image."""
    if isinstance(image, int) and not isinstance(image, bool):
        return str(image)
    if not isinstance(image, str) or not image.strip():
        return None
    return image if image.startswith("data:") else os.path.normpath(image)


def captions_of(path: str | Path) -> dict[str, list[str]]:
    """Captions by the path of their image, of a table or of a file in LLaVA's form (the last answer).

    Raises:
        DataError: as `rows` and `column`, or no caption.
    """
    captions: dict[str, list[str]] = {}
    for where, row in rows(Path(path), Tally()):
        image = row.get(column(row, None, IMAGE_FIELDS, where))
        if isinstance(turns := row.get("conversations"), list):
            texts = [turn.get("value") for turn in turns if isinstance(turn, dict) and turn.get("from") == "gpt"][-1:]
        else:
            texts = row.get(column(row, None, _CAPTION_FIELDS, where))
        texts = texts if isinstance(texts, list) else [texts]
        usable = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
        if isinstance(image, str | int) and usable:
            captions.setdefault(os.path.normpath(str(image)), []).extend(usable)
    if not captions:
        raise DataError(f"{path} has no caption of an image.")
    return captions


def chat_captions(chosen: str | None) -> str | Mapping[str, Sequence[str]] | None:
    """The value of `--captions` as `Chats` takes it."""
    return chosen if chosen in (None, FROM_FIRST_ANSWER) else captions_of(chosen)


def text_or_none(value: Any) -> str | None:
    """An id as text."""
    return None if value is None else str(value)


def no_turns(expected: str, hint: str = "") -> SampleError:
    """The error for a record without turns."""
    return SampleError("turns", f"Expected an object with {expected}.{hint}")
