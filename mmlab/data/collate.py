"""Samples become batches: dialogues about pictures, and pictures paired with captions."""

from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE
from mmlab.data.config import Prompt
from mmlab.data.conversation import Encoded, check_tokenizer, conversations_of, encode, pad_id
from mmlab.data.dialogues import caption_for, caption_of
from mmlab.data.packing import Group, Segment, first_fit, lay_out, split
from mmlab.data.sample import ImageSpec, Sample, SampleError
from mmlab.data.templates import TEMPLATES
from mmlab.keyed import draw

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """One sample on its way into a batch.

    Attributes:
        key, source: of the sample.
        context: the picture's segment where several dialogues share it, else None.
        segments: one per dialogue; behind `context` without the tokens that it holds.
        image: uint8 `[3, H, W]` if a dialogue shows the picture, else None.
        counters: what happened to the sample, for the data report.
        image_key: of the picture, unique over all shards.
    """

    key: str
    source: str
    context: Segment | None
    segments: list[Segment]
    image: Tensor | None
    counters: dict[str, int] = field(default_factory=dict)
    image_key: str = ""


class ChatCollate:
    """Dialogues about pictures as rows of segments, see `ChatBatch`.

    Several questions about one picture share its tokens: the text up to the picture is one segment that every
    question sees. A row holds one sample, or with `pack` as many as fit. What exceeds `max_length` goes on
    in a further row that repeats the picture, so a batch may have more rows than samples.

    Args:
        tokenizer: a fast tokenizer.
        prompt: how records become text.
        image: how pictures are decoded and the places that each takes; None for a language model alone.
        max_length: longest row, picture places included.
        pack: fill rows with several samples.

    Raises:
        ConfigError: a tokenizer or lengths with which no sample could be made.
    """

    members: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        prompt: Prompt,
        image: ImageSpec | None,
        max_length: int = 2048,
        pack: bool = False,
    ):
        check_tokenizer(tokenizer)
        TEMPLATES[prompt.template].stop(tokenizer)
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.image = image if prompt.pictures == "tokens" else None
        scattered = ImageSpec(0, tokens=prompt.places) if prompt.pictures == "scattered" else None
        self.spec = self.image or scattered
        self.max_length = max_length
        self.pack = pack
        if self.spec and not 0 < self.spec.tokens < max_length:
            of = "prompt.places" if scattered else "image.tokens to what the connector gives"
            raise ConfigError(
                f"A picture takes {self.spec.tokens} tokens and a row max_length={max_length}; set {of}, and "
                "max_length above it."
            )

    def prepare(self, sample: Sample) -> Prepared:
        """Tokenise one sample.

        Raises:
            SampleError: see `conversations_of` and `encode`; `too-long` if no dialogue fits; `no-caption` if one that
                is to be scattered has no token.
        """
        picture = self.image is not None and sample.image is not None
        encoded: list[Encoded] = []
        dialogues = conversations_of(sample.record, self.prompt, sample.seed, picture)
        for dialogue in dialogues:
            try:
                encoded.append(encode(dialogue, self.prompt, self.tokenizer, self.spec, self.max_length))
            except SampleError as error:
                if error.reason != "too-long" or len(dialogues) == 1:
                    raise
        if not encoded:
            raise SampleError("too-long", f"None of the sample's questions fits {self.max_length} tokens.")
        dropped = len(dialogues) - len(encoded) + sum(one.turns_dropped for one in encoded)
        shown = any(one.image_starts for one in encoded)
        counters = {"truncated": int(dropped > 0), "turns_dropped": dropped, "text_only": int(not shown)}
        if self.prompt.pictures == "scattered":
            encoded = [self._scatter(one, sample) for one in encoded]
        context, segments = _shared(encoded)
        image, image_key = sample.image if shown else None, f"{sample.shards}/{sample.key}"
        return Prepared(sample.key, sample.source, context, segments, image, counters, image_key)

    def _scatter(self, encoded: Encoded, sample: Sample) -> Encoded:
        """Fill a picture's places with tokens of its caption, drawn at random, and random others between them.

        A picture's features are spread over its places like that, and most of them say nothing. A language model
        that only ever read the bare caption there repeats it later whatever it is asked: it never had to search.

        Raises:
            SampleError: `no-caption` where no token of the caption is known.
        """
        if not encoded.image_starts:
            return encoded
        text = caption_for(sample.record, self.prompt, sample.seed)
        caption = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not caption:
            raise SampleError("no-caption", "The record's caption has no token that the tokenizer knows.")
        ids = list(encoded.input_ids)
        random = Random(f"{sample.seed}/scatter")
        share = 0.1 + 0.9 * random.random()
        for start in encoded.image_starts:
            for place in range(start, start + self.prompt.places):
                known = random.random() < share
                ids[place] = random.choice(caption) if known else random.randrange(len(self.tokenizer))
        return replace(encoded, input_ids=ids, image_starts=[])

    def batch(self, prepared: list[Prepared]) -> dict[str, Any]:
        """Lay samples out in rows: a `ChatBatch`."""
        groups = [
            group for i, one in enumerate(prepared) for group in split(i, one.context, one.segments, self.max_length)
        ]
        rows = first_fit(groups, self.max_length) if self.pack else [[group] for group in groups]
        layout = lay_out(rows, pad_id(self.tokenizer))
        pictures = [prepared[i].image for i in layout.image_samples]
        size = self.image.size if self.image else 0
        none = torch.zeros((0, 3, size, size), dtype=torch.uint8)
        return {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "segment_ids": layout.segment_ids,
            "context_ids": layout.context_ids,
            "labels": layout.labels,
            "pixel_values": torch.stack([p for p in pictures if p is not None]) if pictures else none,
            "image_positions": layout.image_positions,
            "image_keys": [prepared[i].image_key for i in layout.image_samples],
            "keys": [one.key for one in prepared],
            "stats": _stats(prepared, groups),
            "bad": [],
        }


def _shared(encoded: list[Encoded]) -> tuple[Segment | None, list[Segment]]:
    """The segment that several dialogues about a picture begin with, and what follows it in each."""
    first, n = encoded[0], encoded[0].shared
    same = all(one.input_ids[: one.shared] == first.input_ids[:n] and one.shared == n for one in encoded)
    if len(encoded) == 1 or n == 0 or not same:
        return None, [Segment(one.input_ids, one.labels, one.image_starts) for one in encoded]
    context = Segment(first.input_ids[:n], first.labels[:n], first.image_starts)
    return context, [Segment(one.input_ids[n:], one.labels[n:]) for one in encoded]


def _stats(prepared: list[Prepared], groups: list[Group]) -> dict[str, dict[str, int]]:
    """Counters of each source; tokens as they lie in the rows."""
    stats: dict[str, dict[str, int]] = {}
    counted: list[tuple[str, dict[str, int]]] = [(one.source, one.counters) for one in prepared]
    for group in groups:
        learned = sum(label != IGNORE for segment in group.segments for label in segment.labels[1:])
        pictures = sum(len(segment.image_starts) for segment in group.segments)
        tokens = {"tokens": len(group), "tokens_with_loss": learned, "pictures": pictures}
        counted.append((prepared[group.sample].source, tokens))
    for source, counters in counted:
        known = stats.setdefault(source, {})
        for name, count in counters.items():
            known[name] = known.get(name, 0) + count
    return stats


class PairCollate:
    """Pictures with one caption each, see `PairBatch`; a caption longer than `max_length` is cut.

    Args:
        tokenizer: of the text encoder; its special tokens are added, unless there is a `frame`.
        image: how pictures are decoded.
        max_length: longest caption in tokens.
        augment: cut a random square of 70 to 100 % of the picture's area. Nothing is mirrored: captions
            say left and right.
        frame: ids that begin and end a caption, in place of the tokenizer's special tokens; a cut one has both.
    """

    members: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        image: ImageSpec,
        max_length: int = 64,
        augment: bool = False,
        frame: tuple[int, int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.image: ImageSpec | None = image
        self.max_length = max_length
        self.augment = augment
        self.frame = frame

    def prepare(self, sample: Sample) -> Prepared:
        """Tokenise the caption, of several the one drawn by the sample's seed.

        Raises:
            SampleError: `no-caption` or `no-picture`.
        """
        caption = caption_of(sample.record, sample.seed)
        if caption is None:
            raise SampleError("no-caption", "The record has no caption.")
        if sample.image is None:
            raise SampleError("no-picture", "The sample has no picture.")
        ids, kept = self._tokens(caption)
        picture = _crop(sample.image, sample.seed) if self.augment else sample.image
        counters = {"truncated": int(len(ids) > len(kept)), "tokens": len(kept), "pictures": 1}
        return Prepared(sample.key, sample.source, None, [Segment(kept, [])], picture, counters)

    def _tokens(self, caption: str) -> tuple[list[int], list[int]]:
        """A caption's ids, and those of them that fit."""
        ids = list(self.tokenizer(caption, add_special_tokens=self.frame is None, verbose=False)["input_ids"])
        if self.frame is not None:
            begin, end = self.frame
            return [begin, *ids, end], [begin, *ids[: self.max_length - 2], end]
        if len(ids) <= self.max_length:
            return ids, ids
        return ids, list(self.tokenizer(caption, truncation=True, max_length=self.max_length)["input_ids"])

    def batch(self, prepared: list[Prepared]) -> dict[str, Any]:
        """Pad captions to the longest: a `PairBatch`."""
        captions = [one.segments[0].input_ids for one in prepared]
        shape = len(captions), max(map(len, captions))
        ids, mask = torch.full(shape, pad_id(self.tokenizer)), torch.zeros(shape, dtype=torch.int64)
        for i, caption in enumerate(captions):
            ids[i, : len(caption)] = torch.tensor(caption)
            mask[i, : len(caption)] = 1
        return {
            "pixel_values": torch.stack([one.image for one in prepared if one.image is not None]),
            "input_ids": ids,
            "attention_mask": mask,
            "keys": [one.key for one in prepared],
            "stats": _stats(prepared, []),
            "bad": [],
        }


def _crop(image: Tensor, seed: int) -> Tensor:
    """A square of 70 to 100 % of the area of a uint8 `[3, S, S]`, drawn by `seed` and resized to S."""
    whole = image.shape[-1]
    side = round(whole * (0.7 + 0.3 * draw(seed, "crop/area")) ** 0.5)
    y, x = (int(draw(seed, f"crop/{axis}") * (whole - side + 1)) for axis in "yx")
    part = image[None, :, y : y + side, x : x + side].float()
    resized = F.interpolate(part, size=(whole, whole), mode="bilinear", antialias=True, align_corners=False)
    return resized[0].round().clamp(0, 255).to(torch.uint8)
