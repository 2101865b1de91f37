"""Segments of tokens laid out in rows. Legend: B rows, T tokens, N pictures."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmlab.data.batch import IGNORE

_MULTIPLE = 8  # row lengths that tensor cores like


@dataclass(frozen=True)
class Segment:
    """Tokens that see one another.

    Attributes:
        input_ids: ids; the pad id at picture places.
        labels: the id where there is loss, else `IGNORE`.
        image_starts: the first place of each picture.
    """

    input_ids: list[int]
    labels: list[int]
    image_starts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Group:
    """Segments of one sample that stay in one row.

    Attributes:
        sample: number of the sample in the batch.
        segments: what is laid out one behind the other.
        shared: whether every later segment also sees the first one and counts its positions on from there.
    """

    sample: int
    segments: list[Segment]
    shared: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.segments))


def split(sample: int, context: Segment | None, segments: list[Segment], max_length: int) -> list[Group]:
    """Groups of at most `max_length` tokens; where one is not enough, each repeats the `context`."""
    head = [context] if context else []
    groups: list[Group] = []
    for segment in segments:
        if not groups or len(groups[-1]) + len(segment) > max_length:
            groups.append(Group(sample, [*head], shared=context is not None))
        groups[-1].segments.append(segment)
    return groups


def first_fit(groups: list[Group], max_length: int) -> list[list[Group]]:
    """Rows of at most `max_length` tokens: longest group first, each into the first row with room for it."""
    rows: list[list[Group]] = []
    for group in sorted(groups, key=len, reverse=True):  # a stable sort: ties keep the batch's order
        row = next((row for row in rows if sum(map(len, row)) + len(group) <= max_length), None)
        if row is None:
            rows.append([group])
        else:
            row.append(group)
    return rows


@dataclass(frozen=True)
class Layout:
    """Rows as tensors; all int64 `[B, T]` with T a multiple of 8, and pictures in row order.

    Attributes:
        input_ids, position_ids, segment_ids, context_ids, labels: see `ChatBatch`.
        image_positions: int64 `[N, 2]`.
        image_samples: the sample of each picture.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    context_ids: Tensor
    labels: Tensor
    image_positions: Tensor
    image_samples: list[int]


def lay_out(rows: list[list[Group]], pad: int) -> Layout:
    """Write rows of groups into tensors.

    The first token of a segment has no label: in its row, the token before it belongs to another text.
    """
    longest = max((sum(map(len, row)) for row in rows), default=0)
    shape = len(rows), -(-longest // _MULTIPLE) * _MULTIPLE
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
    positions, numbers, contexts = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    images: list[tuple[int, int]] = []
    samples: list[int] = []
    for r, row in enumerate(rows):
        at = number = 0
        for group in row:
            context = number + 1 if group.shared else 0
            for i, segment in enumerate(group.segments):
                number += 1
                place, behind = slice(at, at + len(segment)), group.shared and i > 0
                start = len(group.segments[0]) if behind else 0
                ids[r, place] = torch.tensor(segment.input_ids)
                labels[r, place] = torch.tensor([IGNORE, *segment.labels[1:]])
                positions[r, place] = torch.arange(start, start + len(segment))
                numbers[r, place] = number
                contexts[r, place] = context if behind else 0
                images += [(r, at + first) for first in segment.image_starts]
                samples += [group.sample] * len(segment.image_starts)
                at += len(segment)
    image_positions = torch.tensor(images, dtype=torch.int64).reshape(-1, 2)
    return Layout(ids, positions, numbers, contexts, labels, image_positions, samples)
