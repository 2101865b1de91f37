"""Parquet files of repositories of `datasets`: images as bytes, with chats, captions or classes."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.data.building import Entry, Rows, versions_of
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import Members, picture_members, record_type
from mmlab.data.record_turns import used_turns
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.messages import chat_of
from mmlab.data.sources.pictures import ImageFolder, files_of
from mmlab.data.sources.tables import CLASS_FIELDS, class_of
from mmlab.data.tally import Tally

_IMAGES = ("image", "images", "img", "jpg", "png", "picture")
_CHATS = ("messages", "conversations", "texts", "prompt")
_CAPTIONS = ("caption", "captions", "text")
_ABOUT = ("id", "key", "type", "system", "completion", "question", "answer")
_NUMBERED = re.compile(r"(.+?)-\d{5}-of-\d{5}\.parquet")
_BATCH = 32  # rows that are read at a time


def parquet(
    path: str | Path,
    files: str = "*.parquet",
    images: str | Path | None = None,
    image_field: str | None = None,
    caption_field: str | None = None,
    class_field: str | None = None,
    missing_budget: float = 0.0,
    kind: str | None = None,
) -> Rows:
    """Read rows with one or more images, as bytes, and what is said about them.

    Args:
        path: a file, or a folder with files of one split.
        files: those of the folder, such as `train-*.parquet`.
        images: folder of images that rows name instead of holding them.
        image_field: the column of the image; None: `image`, `images`, `img`, `jpg`, `png` or `picture`.
        caption_field: the column of the caption or captions; None: `caption`, `captions` or `text`.
        class_field: the column of the class, whose names the file states; None: `class` or `label`.
        missing_budget: share of the rows whose image may be missing or unsupported.
        kind: type of rows without one.

    Returns:
        A row for each row, with its chat (`messages`, `conversations`, or `texts` of `user` and `assistant`),
        `question` and `answer`, caption and class; `without_text` counts those with none of these. Left out: as
        `messages` and `class_of`, and `no-image` for one that has no text either.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: no such file, no parquet file, no column that is read, or files of several splits.
    """
    read = _reader()
    paths = _files(Path(path).expanduser(), files)
    opened = [(one, read(one)) for one in paths]
    schema = opened[0][1].schema_arrow
    columns = _Columns(schema, paths[0], image_field, caption_field, class_field)
    for one, file in opened:
        if missing := [name for name in columns.all if name not in file.schema_arrow.names]:
            raise DataError(f"{one} has no column '{missing[0]}', which {paths[0]} has.")

    def entries() -> Iterator[Entry]:
        from pyarrow import ArrowException

        for one, file in opened:
            number = 0
            try:
                for batch in file.iter_batches(_BATCH, columns=columns.all):
                    for row in batch.to_pylist():
                        yield f"{one}, row {number}", (number, row)
                        number += 1
            except (ArrowException, OSError) as error:
                raise DataError(f"{one} is damaged after row {number}: {_sentence(error)}") from None

    folder = ImageFolder(images)
    count = sum(file.metadata.num_rows for _, file in opened)

    def convert(where: str, entry: tuple[int, dict[str, Any]], tally: Tally) -> tuple[str, Members] | None:
        with tally.row(where):
            return columns.sample(*entry, where, folder, kind, tally)

    return Rows(entries(), convert, Tally("without_text"), missing_budget, count, streamed=versions_of(paths))


class _Columns:
    """The columns that are read, and what each is."""

    def __init__(self, schema: Any, path: Path, image: str | None, caption: str | None, label: str | None):
        names: Sequence[str] = schema.names

        def chosen(one: str | None, usual: Sequence[str]) -> str | None:
            if one is not None and one not in names:
                raise DataError(f"{path} has no column '{one}'; there are {', '.join(names)}.{nearest(one, names)}")
            return one or next((name for name in usual if name in names), None)

        self.image = chosen(image, _IMAGES)
        self.caption = chosen(caption, _CAPTIONS)
        self.label = chosen(label, CLASS_FIELDS)
        self.chat = chosen(None, _CHATS)
        self.all = [name for name in (self.image, self.caption, self.label, self.chat) if name is not None]
        if not self.all:
            usual = ", ".join((*_IMAGES[:2], *_CHATS[:3], *_CAPTIONS, *CLASS_FIELDS))
            raise DataError(f"{path} has none of the columns {usual}; there are {', '.join(names)}.")
        self.all = list(dict.fromkeys([*self.all, *(name for name in _ABOUT if name in names)]))
        self.names = _class_names(schema, self.label)
        self.stem = path.stem.partition("-")[0]

    def sample(
        self, number: int, row: dict[str, Any], where: str, folder: ImageFolder, kind: str | None, tally: Tally
    ) -> tuple[str, Members]:
        """(name, members) of one row; raises SampleError."""
        name = next((str(row[one]) for one in ("id", "key") if row.get(one) is not None), f"{self.stem}-{number:07d}")
        record: dict[str, Any] = {"id": name}
        images = _images(row.get(self.image) if self.image else None)
        if self.chat and row.get(self.chat):
            chat = chat_of({**_chat_of(row, self.chat), "images": images})
            images = chat.images
            record["conversations"] = chat.turns
        elif row.get("question") and isinstance(row.get("answer"), str):
            record["questions"] = [{"question": row["question"], "answer": row["answer"]}]
        if named := record_type(row) or _source(row) or kind:
            record["type"] = named
        record |= _captions(row.get(self.caption) if self.caption else None)
        label = row.get(self.label) if self.label else None
        if isinstance(label, int) and self.names:
            label = self.names[label] if 0 <= label < len(self.names) else None
        if (value := class_of({"class": label}, "class")) is not None:
            record["class"] = value
        parts = [part for part in ("conversations", "questions") if part in record]
        check_sample(record, [*parts, *(["caption"] if {"caption", "captions"} & record.keys() else [])], len(images))
        if "conversations" in record:
            record["conversations"] = used_turns(record["conversations"])
        if not images and not parts and "caption" not in record:
            raise SampleError("no-image", "It has neither an image nor a text.")
        tally.details["without_text"] += not parts and not {"caption", "captions", "class"} & record.keys()
        pictures = folder.read_all(images, where, tally)
        if len(pictures) > 1:
            tally.details["several_images"] += 1
        members: Members = picture_members((picture.extension, picture.data) for picture in pictures)
        members["json"] = record
        if named:
            tally.details[f"type {named}"] += 1
        if value is not None:
            tally.note("classes", str(value))
        return name, members


def _images(value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    values = [{"bytes": one} if isinstance(one, bytes) else one for one in values]
    # An image is its bytes, or else what names it.
    return [one if not isinstance(one, dict) or one.get("bytes") else one.get("path") for one in values if one]


def _chat_of(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The row's chat as a record that `chat_of` reads."""
    if column != "texts":
        return {name: value for name, value in row.items() if name in (column, "completion", "system")}
    listed = row["texts"] if isinstance(row["texts"], list) else []
    turns = []
    for one in listed:
        if not isinstance(one, dict):
            raise SampleError("turns", 'Expected "texts", a list of {"user": text, "assistant": text}.')
        turns += [{"from": "human", "value": one.get("user")}, {"from": "gpt", "value": one.get("assistant")}]
    return {"conversations": turns}


def _source(row: dict[str, Any]) -> str:
    """The source that all `texts` of a row state, as its type."""
    texts = row.get("texts")
    sources = {one.get("source") for one in texts if isinstance(one, dict)} if isinstance(texts, list) else set()
    return record_type({"type": next(iter(sources))}) if len(sources) == 1 else ""


def _captions(value: Any) -> dict[str, Any]:
    texts = [text.strip() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    texts = [text for text in texts if text]
    return {} if not texts else {"caption": texts[0]} if len(texts) == 1 else {"captions": texts}


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names that `datasets` wrote for the numbers of a class."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no {path}.")
    paths = [one for one in files_of(path) if one.match(pattern)]
    if not paths:
        raise DataError(f"{path} has no file '{pattern}'.")
    splits = sorted({match[1] for one in paths if (match := _NUMBERED.fullmatch(one.name))})
    if len(splits) > 1:
        raise DataError(
            f"{path} holds {' and '.join(splits)}, which one set of shards would mix; choose with --files "
            f"'{splits[-1]}-*'."
        )
    return paths


def _sentence(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:200].rstrip('.')}."


def _reader() -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError("parquet files are read with pyarrow: pip install 'mmlab[parquet]'.") from None

    def read(path: Path) -> Any:
        try:
            return ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} is not a parquet file: {_sentence(error)}") from None

    return read
