"""Random conversations about pictures, as our batches and as those of transformers' collators."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Size:
    """Of models and batches.

    Attributes:
        overrides: of the recipe.
        rows, length: of our batches.
        texts: lengths are multiplied by it.
        vocabulary: tokens of texts.
        rounds: steps of each way.
    """

    overrides: tuple[str, ...] = ()
    rows: int = 3
    length: int = 4096
    texts: float = 1.0
    vocabulary: int = 32_000
    rounds: int = 9


_SMALL = "num_hidden_layers:2,num_attention_heads:2,hidden_size:32,intermediate_size:64"
TINY = Size(
    (
        f"model.language.architecture={{{_SMALL},num_key_value_heads:2,max_position_embeddings:512}}",
        f"model.vision.architecture={{{_SMALL},image_size:56}}",
    ),
    rows=2,
    length=400,
    texts=0.2,
    vocabulary=500,
    rounds=2,
)


@dataclass
class Text:
    """Ids and labels of one segment."""

    ids: Tensor
    labels: Tensor


@dataclass
class Sample:
    """A picture with texts.

    Attributes:
        before: the text around the picture's tokens that begins each text, with these.
        column: of its first token in `before`.
        texts: each follows `before`.
    """

    before: Text
    column: int
    texts: list[Text]

    def rows(self) -> list[Text]:
        return [joined([self.before, text]) for text in self.texts]

    def __len__(self) -> int:
        return len(self.before.ids) + sum(len(text.ids) for text in self.texts)


def joined(texts: list[Text]) -> Text:
    return Text(torch.cat([text.ids for text in texts]), torch.cat([text.labels for text in texts]))


def draw_sample(draw: random.Random, kind: str, tokens: int, size: Size) -> Sample:
    """A caption, a conversation, or ten questions about a picture of so many tokens."""
    first, turns, lengths = {
        "caption": (1, 1, ((0, 0), (20, 60))),
        "conversation": (35, draw.randint(2, 5), ((10, 40), (40, 120))),
        "questions": (35, 10, ((10, 20), (8, 30))),
    }[kind]

    def text(length: int, learned: bool) -> Text:
        ids = torch.tensor([draw.randrange(3, size.vocabulary) for _ in range(length)], dtype=torch.int64)
        return Text(ids, ids.clone() if learned else torch.full_like(ids, -100))

    def turn() -> Text:
        question, answer = (round(draw.randint(*bounds) * size.texts) for bounds in lengths)
        return joined([text(question, False), text(max(2, answer), True)])

    column = max(1, round(first * size.texts))
    picture = torch.full((tokens,), size.vocabulary)
    before = joined([text(column, False), Text(picture, torch.full_like(picture, -100))])
    texts = [turn() for _ in range(turns)]
    return Sample(before, column, texts if kind == "questions" else [joined(texts)])


def draw_rows(seed: int, kind: str, tokens: int, size: Size) -> list[list[Sample]]:
    """Rows of samples, each filled until the next sample does not fit."""
    draw, rows = random.Random(seed), []
    for _ in range(size.rows):
        row, used = [], 0
        while used + len(sample := draw_sample(draw, kind, tokens, size)) <= size.length:
            row.append(sample)
            used += len(sample)
        assert row, "a sample is longer than a row"
        rows.append(row)
    return rows


def our_batch(rows: list[list[Sample]], pixels: Tensor, tokens: int, length: int) -> dict[str, Any]:
    """A `ChatBatch` on the host, but for the pixels."""
    names = ("input_ids", "labels", "segment_ids", "context_ids", "position_ids")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    positions: list[tuple[int, int]] = []
    for r, row in enumerate(rows):
        parts: list[tuple[Text, int, int]] = []  # a segment, its context, and its first place
        used = 0
        for sample in row:
            positions += [(r, used + sample.column + i) for i in range(tokens)]
            if len(sample.texts) == 1:
                parts.append((sample.rows()[0], 0, 0))
            else:
                parts.append((sample.before, 0, 0))
                context = len(parts)
                parts += [(text, context, len(sample.before.ids)) for text in sample.texts]
            used += len(sample)
        values = {name: [] for name in names}
        for number, (text, context, start) in enumerate(parts, 1):
            count = len(text.ids)
            values["input_ids"].append(text.ids)
            values["labels"].append(text.labels)
            values["segment_ids"].append(torch.full((count,), number))
            values["context_ids"].append(torch.full((count,), context))
            values["position_ids"].append(torch.arange(start, start + count))
        for name, one in values.items():
            padding = torch.full((length - used,), -100 if name == "labels" else 0)
            columns[name].append(torch.cat([*one, padding]))
    return {
        **{name: torch.stack(rows) for name, rows in columns.items()},
        "pixel_values": pixels,
        "image_positions": torch.tensor(positions),
        "image_features": torch.arange(len(pixels) * tokens),
        "image_keys": [str(n) for n in range(len(pixels))],
    }


def their_batches(rows: list[list[Sample]], pixels: Tensor, device: torch.device) -> list[dict[str, Any]]:
    """Padded rows; where texts share a picture, a micro-batch for each picture, as more would not fit into memory."""
    samples = [sample for row in rows for sample in row]
    several = len(samples[0].texts) > 1
    batches, start = [], 0
    for group in [[sample] for sample in samples] if several else [samples]:
        texts = [text for sample in group for text in sample.rows()]
        chosen = [start + n for n, sample in enumerate(group) for _ in sample.texts]
        start += len(group)
        ids = pad_sequence([text.ids for text in texts], True)
        mask = pad_sequence([torch.ones_like(text.ids) for text in texts], True)
        labels = pad_sequence([text.labels for text in texts], True, -100)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batches.append({name: x.to(device) for name, x in batch.items()} | {"pixel_values": pixels[chosen]})
    return batches


def their_row(rows: list[list[Sample]], pixels: Tensor, device: torch.device) -> dict[str, Any]:
    """All conversations in one row, told apart by their positions, as `DataCollatorWithFlattening` has them."""
    texts = [text for row in rows for sample in row for text in sample.rows()]
    whole = joined(texts)
    places = torch.cat([torch.arange(len(text.ids)) for text in texts])
    batch = {"input_ids": whole.ids, "labels": whole.labels, "position_ids": places}
    return {name: x[None].to(device) for name, x in batch.items()} | {"pixel_values": pixels}
