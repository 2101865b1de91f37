"""Text files of foreign data sets: their encoding, JSON and JSON lines."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError, existing_file
from mmlab.data.tally import Tally


def encoding_of(data: bytes) -> str:
    """The encoding that the first bytes of a text imply: UTF-16 or UTF-32, or else UTF-8 with or without a mark."""
    encoding = json.detect_encoding(data[:4])
    return "utf-8-sig" if encoding == "utf-8" else encoding


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a text file, each with its end; `newline` as for `open`.

    Raises:
        DataError: no such file, it cannot be read, or another encoding (with the line).
    """
    existing_file(path)
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(4))
        with open(path, encoding=encoding, newline=newline) as file:
            yield from file
    except UnicodeError:
        raise _encoding_error(path) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def load_json(path: Path) -> Any:
    """The contents of a JSON file; in UTF-8, UTF-16 or UTF-32.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not JSON.
    """
    data = _bytes(path)
    try:
        return json.loads(data)
    except UnicodeError:
        raise _encoding_error(path) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from None


def load_entries(path: Path, tally: Tally) -> Iterator[tuple[str, Any]]:
    """(where, entry) of each entry of a JSON list, of its `annotations` if it is an object, or of JSON lines.

    A line that is not JSON is left out.

    Args:
        path: the file; its content decides, not its name.
        tally: counts what is left out.

    Raises:
        DataError: as `load_json`, or it holds none of these.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_lines(path, tally)
        return
    try:
        content = load_json(path)
    except DataError:
        if not _begins_with_an_object(path):
            raise
        yield from _json_lines(path, tally)
        return
    if isinstance(content, dict) and "images" not in content:
        content = content.get("annotations", content)
    if not isinstance(content, list):
        coco = isinstance(content, dict) and "images" in content and "annotations" in content
        hint = " Files of COCO are read by `mmlab shards build coco`." if coco else ""
        raise DataError(f"{path} holds neither a JSON list of entries nor JSON lines.{hint}")
    for number, entry in enumerate(content):
        yield f"{path}, entry {number}", entry


def _begins_with_an_object(path: Path) -> bool:
    """Whether the first line of a file that is not JSON as a whole is an object: JSON lines under another name."""
    try:
        return isinstance(json.loads(next((line for line in lines(path) if line.strip()), "")), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path, tally: Tally) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines(path, "\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            tally.leave_out("json", f"{where}: The line is not JSON: {error}.")
            continue
        yield where, entry


def read_text(path: Path) -> str:
    """The text of a whole file, as `lines` reads it."""
    return "".join(lines(path))


def _bytes(path: Path) -> bytes:
    try:
        return existing_file(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _encoding_error(path: Path) -> DataError:
    """What is wrong with the encoding of a file, and in which line."""
    data = _bytes(path)
    encoding = encoding_of(data)
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        if encoding != "utf-8-sig":
            said = f"the {encoding.upper()} that its first bytes imply"
            return DataError(f"{path}, line {number}, is not {said}: {error.reason}.")
        return DataError(
            f"{path}, line {number}, is not UTF-8: byte 0x{data[error.start]:02X}. If it is Latin-1 (Windows-1252), "
            f"convert it: iconv -f WINDOWS-1252 -t UTF-8."
        )
    return DataError(f"{path} changed while it was read.")
