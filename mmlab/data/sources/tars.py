"""Tars of webdataset with other names of members, also compressed."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.config.locations import Location, Url, location
from mmlab.data.building import Entry, Rows, versions_of
from mmlab.data.dialogues import check_sample
from mmlab.data.formats import (
    MEMBER_CAP,
    MOST_PICTURES,
    Members,
    foreign_kind,
    picture_members,
    record_type,
    split_name,
)
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.pictures import READ_SUFFIXES, files_of, stored
from mmlab.data.tally import Tally
from mmlab.data.tar import TarMember, walk

_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
_IMAGES = tuple(suffix.removeprefix(".") for suffix in READ_SUFFIXES)
USUAL = {
    "image": "|".join(_IMAGES),
    **{f"image{n}": "|".join(f"{n}.{name}" for name in _IMAGES) for n in range(MOST_PICTURES)},
    "text": "txt|text|caption|txt.gz",
    "json": "json|json.gz",
    "class": "cls",
}
"""What a sample's members are called; `|` separates names of which it has one. `image` is the first of several."""
_DEADLINE = 3600.0  # seconds for the download of one tar
_IMAGE = re.compile(r"image\d*")

_Found = tuple[IO[bytes], dict[str, TarMember]]
"""An open tar, and members of one sample by their extension."""


def tars(path: str | Location, members: Mapping[str, str] | None = None) -> Rows:
    """Read samples of tars: adjacent members with the same name up to its first dot.

    Args:
        path: a tar, or a folder of tars; also an address, from which one tar after the other is downloaded.
        members: names of members by what they are, see `USUAL`, such as `{"image": "input.jpg", "text": "output.txt"}`
            or `{"image0": "left.png", "image1": "right.png"}`; then a sample must have each of them.

    Returns:
        A row for each sample. The text becomes the caption, the class the class, and the fields of the JSON the record.
        Left out: `no-member`, `pictures` (an image in two formats, or too many), `json`, `unicode`, `unsupported`, and
        what `stored` names.

    Raises:
        ConfigError: a member of another kind.
        DataError: no tar, or one that is damaged.
    """
    if wrong := next((name for name in members or () if name not in USUAL), None):
        single = [name for name in USUAL if name == "image" or not _IMAGE.fullmatch(name)]
        options = f"{', '.join(single)}; image0, image1, … are further images"
        raise ConfigError(f"a sample has no member '{wrong}'.{nearest(wrong, single)} Options: {options}.")
    kinds = [kind for kind in USUAL if kind in (members or USUAL)]  # in the order of the images
    names = {kind: tuple((members or USUAL)[kind].lower().split("|")) for kind in kinds}
    tally, (paths, versions) = Tally(), _listed(path)
    if not paths:
        raise DataError(f"{path} holds no tar.")
    wanted = {name for choices in names.values() for name in choices}

    def convert(where: str, found: _Found, tally: Tally) -> tuple[str, Members] | None:
        with tally.row(where):
            for extension in found[1].keys() - wanted:
                tally.details[f"not read .{extension}"] += 1
            return _sample(where.rpartition(": ")[2], found, names, members is not None, tally)

    return Rows(_entries(paths, tally), convert, tally, streamed=versions)


def _listed(path: str | Location) -> tuple[Sequence[Location], list[str]]:
    """The tars of a folder or below an address, and what changes when one is written again."""
    place = location(path)
    if isinstance(place, Url):
        from mmlab.data.remote.download import retried
        from mmlab.data.remote.store import open_store

        is_tar = place.name.lower().endswith(_TARS)
        store = open_store(place.parent if is_tar else place)
        blobs = [retried(lambda: store.stat(place.name))] if is_tar else retried(lambda: store.list(""))
        blobs = [blob for blob in blobs if blob.name.lower().endswith(_TARS)]
        return [store.url / blob.name for blob in blobs], [f"{blob.name} {blob.size} {blob.etag}" for blob in blobs]
    if not place.exists():
        raise DataError(f"there is no {path}.")
    paths = [place] if place.is_file() else [one for one in files_of(place) if one.name.lower().endswith(_TARS)]
    return paths, versions_of(paths)


def _entries(paths: Sequence[Location], tally: Tally) -> Iterator[Entry]:
    for path in paths:
        file = _plain(path)
        members = ((_key(member), member) for member in walk(file.fileno(), path))
        for key, group in groupby(_of_samples(members, tally), lambda pair: pair[0]):
            found = {parts[1]: member for _, member in group if (parts := split_name(member.name))}
            yield f"{path}: {key}", (file, found)


def _of_samples(members: Iterable[tuple[str | None, TarMember]], tally: Tally) -> Iterator[tuple[str, TarMember]]:
    """The members that belong to a sample; macOS writes hidden files between them."""
    for key, member in members:
        if key is None:
            tally.details["members_without_a_sample"] += 1
        else:
            yield key, member


def _key(member: TarMember) -> str | None:
    """The key of a member; None for one that belongs to no sample, such as a hidden file."""
    parts, kind = split_name(member.name), foreign_kind(member.name)
    # A kind that is an extension, such as `.url`, is only one that shards do not hold.
    return None if parts is None or kind not in (None, f".{parts[1]}") else parts[0]


def _plain(path: Location) -> IO[bytes]:
    """An open tar; a compressed one is unpacked into a temporary file, so that its end is checked, too."""
    file = open(path, "rb") if isinstance(path, Path) else _downloaded(path)  # noqa: SIM115
    start = file.read(8)
    opener = next((opener for magic, opener in _OPENERS if start.startswith(magic)), None)
    file.seek(0)
    if opener is None:
        return file
    plain = TemporaryFile()  # noqa: SIM115
    try:
        with file, opener(file) as packed:
            shutil.copyfileobj(packed, plain)
    except (EOFError, OSError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}.") from None
    plain.flush()
    return plain


def _downloaded(url: Url) -> IO[bytes]:
    """An open copy of a tar, which is gone when it is closed."""
    from mmlab.data.remote.download import download
    from mmlab.data.remote.store import open_store

    with TemporaryDirectory() as folder:
        copy = Path(folder, "copy.tar")
        download(open_store(url.parent), url.name, copy, deadline=_DEADLINE)
        return copy.open("rb")


def _sample(
    key: str, found: _Found, names: Mapping[str, Sequence[str]], strict: bool, tally: Tally
) -> tuple[str, Members]:
    """(name, members) of a sample; raises SampleError."""
    data: dict[str, bytes] = {}
    images: list[bytes] = []
    for kind, choices in names.items():
        present = [name for name in choices if name in found[1]]
        if _IMAGE.fullmatch(kind) and len(present) > 1:
            raise SampleError(
                "pictures", f"It has the images {' and '.join(present)}; choose one with --members {kind}={present[0]}."
            )
        if present and _IMAGE.fullmatch(kind):
            images.append(_read(found[0], found[1][present[0]]))
        elif present:
            data[kind] = _read(found[0], found[1][present[0]])
        elif strict:
            has = ", ".join(f".{name}" for name in found[1])
            raise SampleError("no-member", f"It has no .{' or .'.join(choices)}, but {has}.")
    if not data and not images:
        raise SampleError("no-member", f"It has only {', '.join(f'.{name}' for name in found[1])}.")
    record = _record(key, data)
    parts = [part for part in ("questions", "conversations") if record.get(part)]
    parts += ["caption"] if record.get("caption") or record.get("captions") else []
    if len(images) > MOST_PICTURES:
        raise SampleError("pictures", f"It has {len(images)} images; a sample holds at most {MOST_PICTURES}.")
    check_sample(record, parts, len(images))
    members: Members = {"json": record, **picture_members(stored(image, key, tally) for image in images)}
    if len(images) > 1:
        tally.details["several_images"] += 1
    if kind := record_type(record):
        tally.details[f"type {kind}"] += 1
    return key, members


def _record(key: str, data: Mapping[str, bytes]) -> dict[str, Any]:
    record: Any = {}
    try:
        if "json" in data:
            record = json.loads(data["json"], parse_constant=lambda _: None)
        text, label = (data[kind].decode("utf-8-sig").strip() if kind in data else "" for kind in ("text", "class"))
    except UnicodeDecodeError as error:
        raise SampleError("unicode", f"A text is not UTF-8: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise SampleError("json", f"Its JSON does not parse: {error}.") from None
    if not isinstance(record, dict):
        raise SampleError("json", f"Its JSON is a {type(record).__name__}, not an object.")
    record = {"id": key, **record}
    record |= {"caption": text} if text else {}
    return record | ({"class": label} if label else {})


def _read(file: IO[bytes], member: TarMember) -> bytes:
    data = os.pread(file.fileno(), member.size, member.offset)
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as packed:
            plain = packed.read(MEMBER_CAP + 1)
    except (EOFError, OSError) as error:
        raise SampleError("decode", f"Its member {member.name} cannot be unpacked: {error}.") from None
    if len(plain) > MEMBER_CAP:
        raise SampleError("decode", f"Its member {member.name} is larger than {MEMBER_CAP} bytes.")
    return plain
