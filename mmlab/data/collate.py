"""Samples become batches: dialogues about images, and images paired with captions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from mmlab.config.errors import ConfigError
from mmlab.data.augmentation import cropped, placed
from mmlab.data.batch import IGNORE
from mmlab.data.class_texts import class_name, class_text
from mmlab.data.config import ANYRES, ASPECTS, ImageTextDataConfig, Prompt
from mmlab.data.conversation import Segment, check_tokenizer, check_vocabulary, encode, pad_id
from mmlab.data.dialogues import caption_for, caption_of, conversations_of
from mmlab.data.packing import Group, first_fit, lay_out, place_pictures, split
from mmlab.data.sample_types import ImageSpec, Picture, Prepared, Sample, SampleError
from mmlab.data.templates import template_named
from mmlab.data.turns import Dialogue
from mmlab.keyed import stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatCollate:
    """Dialogues about images as rows of segments, see `ChatBatch`.

    Several questions about a sample's pictures share their tokens: the text up to the last picture is one segment that
    every question sees. A row holds one sample, or with `pack` as many as fit. A sample longer than `max_length`
    continues in another row that repeats the image, so a batch may have more rows than samples.

    Args:
        config: settings.
        prompt: how records become text.
        tokenizer: a fast tokenizer.
        image: how images are decoded and the places that each takes; None for a language model alone.
        vocabulary: tokens that the model has, if the tokenizer may have more.

    Raises:
        ConfigError: a tokenizer or lengths with which no sample could be used.
    """

    members: tuple[str, ...] = ()

    def __init__(
        self,
        config: ImageTextDataConfig,
        prompt: Prompt,
        tokenizer: "PreTrainedTokenizerBase",
        image: ImageSpec | None,
        vocabulary: int | None = None,
    ):
        check_tokenizer(tokenizer)
        template_named(prompt.template).stop(tokenizer)
        self.config = config
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.image = image if prompt.pictures == "tokens" else None
        if self.image and config.augment and self.image.aspect == ANYRES:
            raise ConfigError(f"data.augment=true moves square pictures; with data.aspect={ANYRES} leave it out.")
        if self.image:
            check_room(self.image, config)
        elif prompt.pictures == "scattered" and prompt.places >= config.max_length:
            raise _no_room(f"A scattered caption takes {prompt.places}", config, "prompt.places below it")

    def prepare(self, sample: Sample) -> Prepared:
        """Tokenize one sample.

        Raises:
            SampleError: see `conversations_of`, `encode` and `check_vocabulary`; `too-long` if no dialogue fits;
                `no-caption` if a caption that is to be scattered has no token.
        """
        length = self.config.max_length
        segments: list[Segment] = []
        dialogues = self.dialogues(sample)
        places = self.places(sample)
        for dialogue in dialogues:
            try:
                segments.append(encode(dialogue, self.prompt, self.tokenizer, places, length))
            except SampleError as error:
                if error.reason != "too-long" or len(dialogues) == 1:
                    raise
        if not segments:
            raise SampleError("too-long", f"None of the sample's questions fits in {length} tokens.")
        dropped = len(dialogues) - len(segments) + sum(segment.turns_dropped for segment in segments)
        has_image = any(segment.image_starts for segment in segments)
        if self.prompt.pictures == "scattered":
            segments = [self._scatter(segment, sample) for segment in segments]
        for segment in segments:
            check_vocabulary(segment.input_ids, self.vocabulary, self.tokenizer)
        pictures = self._varied(sample) if self.config.augment else sample.pictures
        groups = split(*_share(segments), length, pictures, f"{sample.shards}/{sample.key}")
        laid_out = [segment for group in groups for segment in group.segments]
        counters = {
            "truncated": int(dropped > 0),
            "turns_dropped": dropped,
            "text_only": int(not has_image),
            "tokens": sum(map(len, laid_out)),
            "tokens_with_loss": sum(label != IGNORE for segment in laid_out for label in segment.labels[1:]),
            "pictures": sum(len(segment.image_starts) for segment in laid_out),
        }
        return Prepared(groups, counters)

    def dialogues(self, sample: Sample) -> list[Dialogue]:
        """The dialogues of a sample; raises what `conversations_of` raises."""
        shown = 0 if self.image is None else len(sample.pictures)
        return conversations_of(sample.record, self.prompt, sample.seed, shown)

    def places(self, sample: Sample) -> list[int]:
        """The number of places that each picture of a sample takes."""
        if self.prompt.pictures == "scattered":
            return [self.prompt.places]
        return [len(picture.places) for picture in sample.pictures]

    def _varied(self, sample: Sample) -> list[Picture]:
        """The sample's pictures, all at the same random place in their squares."""
        return [replace(one, tiles=placed(one.tiles[0], sample.seed)[None]) for one in sample.pictures]

    def _scatter(self, segment: Segment, sample: Sample) -> Segment:
        """Fill an image's places with tokens of its caption, drawn at random, and random others between them.

        An image's features are spread over its places in the same way, and most of them carry no information. A
        language model that only ever read the bare caption there later repeats it whatever the question is: it never
        had to search.

        Raises:
            SampleError: `no-caption` if no token of the caption is in the vocabulary.
        """
        if not segment.image_starts:
            return segment
        text = caption_for(sample.record, self.prompt, sample.seed)
        caption = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not caption:
            raise SampleError("no-caption", "The record's caption has no token that the tokenizer knows.")
        ids = list(segment.input_ids)
        random = stream(sample.seed, "scatter")
        share, vocabulary = 0.1 + 0.9 * random.random(), len(self.tokenizer)
        vocabulary = min(vocabulary, self.vocabulary or vocabulary)
        for start in segment.image_starts:
            for place in range(start, start + self.prompt.places):
                ids[place] = random.choice(caption) if random.random() < share else random.randrange(vocabulary)
        return replace(segment, input_ids=ids, image_starts=[])

    def batch(self, contents: list[list[Group]]) -> dict[str, Any]:
        """Lay samples out in rows: a `ChatBatch`."""
        groups = [group for sample in contents for group in sample]
        rows = first_fit(groups, self.config.max_length) if self.config.pack else [[group] for group in groups]
        fields, shown = lay_out(rows, pad_id(self.tokenizer))
        tokens, size = (self.image.tokens, self.image.size) if self.image else (0, 0)
        return {**fields, **place_pictures(shown, tokens, size)}


def check_room(image: ImageSpec, config: ImageTextDataConfig) -> None:
    """Check that a row has room for text beside the picture that takes the most tokens.

    Args:
        image: how pictures are decoded.
        config: settings of the data.

    Raises:
        ConfigError: it has none, or an image takes no token.
    """
    if not image.tokens:
        raise ConfigError(
            "An image takes 0 tokens; the vision encoder or Q-Former must give it some (tokens_per_image)."
        )
    if image.most_tokens >= config.max_length and image.aspect == ANYRES:
        raise _no_room(
            f"With data.aspect={ANYRES} an image takes up to {image.most_tokens}", config, "fewer tiles in data.grids"
        )
    if image.most_tokens >= config.max_length:
        raise _no_room(f"An image takes {image.most_tokens}", config)


def _no_room(takes: str, config: ImageTextDataConfig, *others: str) -> ConfigError:
    remedies = ", or ".join(["data.max_length above it", *others])
    return ConfigError(f"{takes} tokens and a row data.max_length={config.max_length}; set {remedies}.")


def _share(segments: list[Segment]) -> tuple[Segment | None, list[Segment]]:
    """The segment that several dialogues about an image begin with, and the rest of each."""
    first, n = segments[0], segments[0].shared
    same = all(
        (one.input_ids[: one.shared], one.image_starts, one.shared) == (first.input_ids[:n], first.image_starts, n)
        for one in segments
    )
    if len(segments) == 1 or n == 0 or not same:
        return None, segments
    context = Segment(first.input_ids[:n], first.labels[:n], first.image_starts)
    return context, [Segment(one.input_ids[n:], one.labels[n:]) for one in segments]


class PairCollate:
    """Images with one caption each, see `PairBatch`; a caption longer than `max_length` is cut.

    Args:
        config: settings.
        tokenizer: of the text encoder; its special tokens are added, unless there is a `frame`.
        image: how images are decoded.
        frame: ids that begin and end a caption, in place of the tokenizer's special tokens; a cut one has both.
        vocabulary: tokens that the text encoder has, if the tokenizer may have more.
        class_prompt: makes a caption of a sample's class where the record has none, see `class_text`.
    """

    def __init__(
        self,
        config: ImageTextDataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        image: ImageSpec,
        frame: tuple[int, int] | None = None,
        vocabulary: int | None = None,
        class_prompt: str | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        if image.aspect == ANYRES:
            raise ConfigError(f"data.aspect={ANYRES} is for stages that write text; choose {', '.join(ASPECTS)} here.")
        self.image: ImageSpec | None = image
        self.frame = frame
        self.vocabulary = vocabulary
        self.class_prompt = class_prompt
        self.members: tuple[str, ...] = () if class_prompt is None else ("cls",)

    def prepare(self, sample: Sample) -> Prepared:
        """Tokenize the caption; of several, the one drawn by the sample's seed.

        Raises:
            SampleError: `no-caption` or `no-picture`; see `check_vocabulary`.
        """
        caption = self.caption(sample)
        if sample.image is None:
            raise SampleError("no-picture", "The sample has no image.")
        ids, cut = self.tokens(caption)
        image = cropped(sample.image, sample.seed) if self.config.augment else sample.image
        return Prepared((image, ids), {"truncated": int(cut), "tokens": len(ids), "pictures": 1})

    def caption(self, sample: Sample) -> str:
        """The caption of a sample, or of its class; raises SampleError `no-caption`."""
        caption = caption_of(sample.record, sample.seed)
        if caption is not None:
            return caption
        name = class_name(sample.record, sample.members)
        if self.class_prompt is not None and name is not None:
            return class_text(self.class_prompt, name)
        hint = "" if name is None else "; \"stage.class_prompt='a photo of a {}.'\" makes one of its class"
        raise SampleError("no-caption", f"The record has no caption{hint}.")

    def tokens(self, caption: str) -> tuple[list[int], bool]:
        """A caption's ids, as many as fit, and whether it was cut; raises what `check_vocabulary` raises."""
        length, cut = self.config.max_length, False
        ids = list(self.tokenizer(caption, add_special_tokens=self.frame is None, verbose=False)["input_ids"])
        if self.frame is not None:
            begin, end = self.frame
            ids, cut = [begin, *ids[: length - 2], end], len(ids) > length - 2
        elif len(ids) > length:
            ids, cut = list(self.tokenizer(caption, truncation=True, max_length=length)["input_ids"]), True
        check_vocabulary(ids, self.vocabulary, self.tokenizer)
        return ids, cut

    def batch(self, contents: list[tuple[Tensor, list[int]]]) -> dict[str, Any]:
        """Pad captions to the longest: a `PairBatch`."""
        images, captions = zip(*contents, strict=True)
        return {"pixel_values": default_collate(list(images)), **self.padded(captions)}

    def padded(self, captions: Sequence[list[int]]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of captions, padded to the longest."""
        shape = len(captions), max(map(len, captions))
        ids, mask = torch.full(shape, pad_id(self.tokenizer)), torch.zeros(shape, dtype=torch.int64)
        for i, caption in enumerate(captions):
            ids[i, : len(caption)] = torch.tensor(caption)
            mask[i, : len(caption)] = 1
        return {"input_ids": ids, "attention_mask": mask}
