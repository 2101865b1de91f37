"""Segments of tokens laid out in rows. Legend: B rows, T tokens, K tiles of pictures, P features of a tile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mmlab.data.batch import IGNORE
from mmlab.data.conversation import Segment
from mmlab.data.sample_types import NEWLINE, Picture

_MULTIPLE = 8  # row lengths that suit tensor cores


@dataclass(frozen=True)
class Group:
    """Segments of one sample that stay in one row.

    Attributes:
        segments: in their order in the row.
        shared: whether every later segment also sees the first one and continues its positions.
        pictures: of the sample; a segment with n pictures shows the first n.
        key: of the sample, unique over all shards.
    """

    segments: list[Segment]
    shared: bool = False
    pictures: Sequence[Picture] = ()
    key: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def split(
    context: Segment | None, segments: list[Segment], max_length: int, pictures: Sequence[Picture] = (), key: str = ""
) -> list[Group]:
    """Groups of at most `max_length` tokens; if there are several, each repeats the `context`."""
    groups: list[Group] = []
    for segment in segments:
        if not groups or len(groups[-1]) + len(segment) > max_length:
            groups.append(Group([context] if context else [], context is not None, pictures, key))
        groups[-1].segments.append(segment)
    return groups


def first_fit(groups: list[Group], max_length: int) -> list[list[Group]]:
    """Rows of at most `max_length` tokens: longest group first, each in the first row with room for it."""
    rows: list[list[Group]] = []
    for group in sorted(groups, key=len, reverse=True):  # a stable sort: ties keep the batch's order
        row = next((row for row in rows if sum(map(len, row)) + len(group) <= max_length), None)
        if row is None:
            rows.append([group])
        else:
            row.append(group)
    return rows


@dataclass(frozen=True)
class Shown:
    """A picture in a batch.

    Attributes:
        picture: its tiles and places.
        row, column: of its first place.
        key: unique over all shards.
    """

    picture: Picture
    row: int
    column: int
    key: str = ""


def place_pictures(shown: Sequence[Shown], tokens: int, size: int) -> dict[str, Any]:
    """Gather the tiles of a batch's pictures, and what each of their places takes of the tiles' features.

    Args:
        shown: in any order.
        tokens: P, features of a tile.
        size: side of a tile in pixels.

    Returns:
        `pixel_values`, `image_positions`, `image_features` and `image_keys` of a `ChatBatch`.
    """
    tiles = [tile for one in shown for tile in one.picture.tiles]
    pixels = default_collate(tiles) if tiles else torch.zeros((0, 3, size, size), dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    places = torch.cat([none, *(one.picture.places for one in shown)])
    # Of each picture: its row, what its first column is beyond its place among all places, its first feature.
    offsets: list[tuple[int, int, int]] = []
    before, keys = 0, list[str]()
    for one in shown:
        offsets.append((one.row, one.column - before, len(keys) * tokens))
        before += len(one.picture.places)
        # After the last slash, a key has no dot.
        keys += [f"{one.key}.tile{tile}" if tile else one.key for tile in range(len(one.picture.tiles))]
    counts = torch.tensor([len(one.picture.places) for one in shown], dtype=torch.int64)
    each = torch.tensor(offsets, dtype=torch.int64).reshape(-1, 3).repeat_interleave(counts, 0)
    rows, columns, firsts = each.unbind(1)
    columns = columns + torch.arange(len(places))
    return {
        "pixel_values": pixels,
        "image_positions": torch.stack([rows, columns], 1),
        "image_features": torch.where(places == NEWLINE, len(pixels) * tokens, places + firsts),
        "image_keys": keys,
    }


def lay_out(rows: list[list[Group]], pad: int) -> tuple[dict[str, Tensor], list[Shown]]:
    """Write rows of groups into tensors.

    The first token of a segment has no label: the token before it in its row belongs to another text.

    Returns:
        `input_ids`, `position_ids`, `segment_ids`, `context_ids` and `labels` (int64 `[B, T]`, T a multiple of 8) of a
        `ChatBatch`; and the pictures in them.
    """
    longest = max((sum(map(len, row)) for row in rows), default=0)
    shape = len(rows), -(-longest // _MULTIPLE) * _MULTIPLE
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    positions, numbers, contexts = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    shown: list[Shown] = []
    for r, row in enumerate(rows):
        at = number = 0
        for group in row:
            context = number + 1 if group.shared else 0
            for i, segment in enumerate(group.segments):
                number += 1
                place, after = slice(at, at + len(segment)), group.shared and i > 0
                start = len(group.segments[0]) if after else 0
                ids[r, place] = torch.tensor(segment.input_ids)
                labels[r, place] = torch.tensor([IGNORE, *segment.labels[1:]])
                positions[r, place] = torch.arange(start, start + len(segment))
                numbers[r, place] = number
                contexts[r, place] = context if after else 0
                for n, first in enumerate(segment.image_starts):
                    shown.append(Shown(group.pictures[n], r, at + first, f"{group.key}.{n}" if n else group.key))
                at += len(segment)
    fields = {
        "input_ids": ids,
        "position_ids": positions,
        "segment_ids": numbers,
        "context_ids": contexts,
        "labels": labels,
    }
    return fields, shown
