"""Images and texts of a set of shards, as vectors of a model that compares them.

Legend: N images, Q vectors of an image (one, or those of a Q-Former's queries), M texts, T tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from mmlab.data.class_texts import class_name
from mmlab.data.collate import PairCollate
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.progress_bar import progress
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.model.dual_encoder import DualEncoder
from mmlab.model.image_text_qformer import ImageTextQFormer


class PairEncoder:
    """Encodes images and texts as in training.

    Args:
        model: in eval mode, on its device.
        data: the training's settings: `max_length` and `aspect`.

    Attributes:
        spec: how images are decoded.
    """

    def __init__(self, model: DualEncoder | ImageTextQFormer, data: ImageTextDataConfig):
        self.model = model
        self.spec = ImageSpec(model.vision.image_size, data.aspect, reduce_jpegs=data.reduce_jpegs)
        if isinstance(model, ImageTextQFormer):
            self.collate = PairCollate(data, model.tokenizer, self.spec, model.frame)
        else:
            self.collate = PairCollate(data, model.text.tokenizer, self.spec, vocabulary=model.text.vocabulary)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def tokens(self, text: str) -> tuple[int, ...]:
        """The tokens of a text, as many as are read; raises SampleError for one that the model has not."""
        return tuple(self.collate.tokens(text)[0])

    @torch.no_grad()
    def images(self, pixels_N3HW: Tensor) -> Tensor:
        """uint8 images → unit vectors, float32 `[N, Q, E]`."""
        vectors = self.model.encode_images(pixels_N3HW.to(self.device))
        return vectors.reshape(len(vectors), -1, vectors.shape[-1])

    @torch.no_grad()
    def texts(self, tokens: Sequence[tuple[int, ...]], batch_size: int) -> Tensor:
        """M tokenized texts → unit vectors, float32 `[M, E]`; texts of similar length are encoded together."""
        order = sorted(range(len(tokens)), key=lambda n: len(tokens[n]))
        vectors: list[Tensor] = []
        starts = range(0, len(order), batch_size)
        for start in progress(starts, "encoding texts", len(starts)):
            rows = self.collate.padded([list(tokens[n]) for n in order[start : start + batch_size]])
            vectors.append(self.model.encode_texts(*(value.to(self.device) for value in rows.values())))
        return torch.cat(vectors)[torch.tensor(order).argsort()]


def similarity(images_NQE: Tensor, texts_ME: Tensor) -> Tensor:
    """Cosine similarity of each image, by its most similar vector, and each text: `[N, M]`."""
    if images_NQE.shape[1] == 1:
        return images_NQE[:, 0] @ texts_ME.T
    return torch.einsum("nqe,me->nqm", images_NQE, texts_ME).amax(1)


@dataclass
class Distinct:
    """The distinct images and captions of a set of shards, and which of them belong together.

    Images that are the same pixels are one image, and captions that are the same tokens are one text: a model cannot
    tell them apart, so each caption is a right one for all images that have it.

    Attributes:
        places: N places in the set of pictures, of the first sample of each image.
        images_NQE: their vectors.
        tokens: M distinct texts.
        texts: the same as text, as the first caption with these tokens has it.
        pairs: (image, text) → number of captions.
        classes: class of each image, None without one.
        captions, samples: numbers before equal ones were merged.
    """

    places: list[int] = field(default_factory=list)
    images_NQE: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1))
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    classes: list[str | None] = field(default_factory=list)
    samples: int = 0

    @property
    def captions(self) -> int:
        return sum(self.pairs.values())


def read_distinct(pictures: PictureSet, encoder: PairEncoder, batch_size: int) -> Distinct:
    """Encode the images of a set, and read their captions and classes.

    Args:
        pictures: decoded as `encoder.spec` says. A sample whose image, record or captions cannot be used is counted in
            its `bad`.
        encoder: the model.
        batch_size: images at a time.

    Raises:
        DataError: no image can be used, or more are bad than the budget allows.
    """
    distinct, numbers, texts = Distinct(), {}, {}
    vectors: list[Tensor] = []
    owners: list[int] = []  # the distinct image of each decoded one
    for batch in pictures.batches(batch_size, "encoding images"):
        hashes = [blake2b(one.numpy().tobytes(), digest_size=16).digest() for one in batch]
        fresh = [n for n, one in enumerate(hashes) if one not in numbers and one not in hashes[:n]]
        for n in fresh:
            numbers[hashes[n]] = len(numbers)
            distinct.places.append(len(owners) + n)
        owners += [numbers[one] for one in hashes]
        if fresh:
            vectors.append(encoder.images(batch[fresh]))
    distinct.images_NQE, distinct.samples = torch.cat(vectors), len(owners)
    distinct.classes = [None] * len(numbers)
    for n, image in enumerate(owners):
        with pictures.bad.left_out(pictures.key(n)):
            sample = pictures.sample(n)
            for text in captions_of(sample.record):
                row = texts.setdefault(encoder.tokens(text), len(texts))
                if row == len(distinct.texts):
                    distinct.texts.append(text)
                distinct.pairs[image, row] = distinct.pairs.get((image, row), 0) + 1
            if distinct.classes[image] is None:
                distinct.classes[image] = class_name(sample.record, sample.members)
    distinct.tokens = list(texts)
    return distinct


def captions_of(record: dict[str, Any]) -> list[str]:
    """All captions of a record: its `captions`, or else its `caption`."""
    several = record.get("captions")
    texts = several if isinstance(several, list) else []
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    single = record.get("caption")
    return texts or ([single] if isinstance(single, str) and single.strip() else [])
