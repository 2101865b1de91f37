"""Segments of tokens laid out in rows. Legend: B rows, T tokens, N images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmlab.data.batch import IGNORE
from mmlab.data.conversation import Segment

_MULTIPLE = 8  # row lengths that suit tensor cores


@dataclass(frozen=True)
class Group:
    """Segments of one sample that stay in one row.

    Attributes:
        segments: in their order in the row.
        shared: whether every later segment also sees the first one and continues its positions.
        image: uint8 `[3, H, W]` if a segment shows the sample's image, else None.
        image_key: of the image, unique over all shards.
    """

    segments: list[Segment]
    shared: bool = False
    image: Tensor | None = None
    image_key: str = ""

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def split(
    context: Segment | None, segments: list[Segment], max_length: int, image: Tensor | None = None, image_key: str = ""
) -> list[Group]:
    """Groups of at most `max_length` tokens; if there are several, each repeats the `context`."""
    groups: list[Group] = []
    for segment in segments:
        if not groups or len(groups[-1]) + len(segment) > max_length:
            groups.append(Group([context] if context else [], context is not None, image, image_key))
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


def lay_out(rows: list[list[Group]], pad: int) -> tuple[dict[str, Tensor], list[Group]]:
    """Write rows of groups into tensors.

    The first token of a segment has no label: the token before it in its row belongs to another text.

    Returns:
        `input_ids`, `position_ids`, `segment_ids`, `context_ids`, `labels` (int64 `[B, T]`, T a multiple of 8) and
        `image_positions` (int64 `[N, 2]`) of a `ChatBatch`; and the group of each image.
    """
    longest = max((sum(map(len, row)) for row in rows), default=0)
    shape = len(rows), -(-longest // _MULTIPLE) * _MULTIPLE
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    positions, numbers, contexts = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    images: list[tuple[int, int]] = []
    owners: list[Group] = []
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
                images += [(r, at + first) for first in segment.image_starts]
                owners += [group] * len(segment.image_starts)
                at += len(segment)
    fields = {
        "input_ids": ids,
        "position_ids": positions,
        "segment_ids": numbers,
        "context_ids": contexts,
        "labels": labels,
        "image_positions": torch.tensor(images, dtype=torch.int64).reshape(-1, 2),
    }
    return fields, owners
