"""Class or caption of an image, which a generative model is conditioned on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmlab.class_names import class_index
from mmlab.config.errors import nearest
from mmlab.data.class_texts import class_name
from mmlab.data.conversation import check_vocabulary, pad_id
from mmlab.data.dialogues import caption_of
from mmlab.data.sample_types import Sample, SampleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conditioning:
    """Reads from a sample what the model is conditioned on: its class, its caption, both or neither.

    Args:
        labels: names of the classes in the order of their numbers; None reads no class.
        tokenizer: of the captions; None reads none.
        max_length: tokens of every caption, which is padded or cut to them, as in CLIP and LDM.
        vocabulary: tokens that the text encoder has, if the tokenizer may have more.
    """

    def __init__(
        self,
        labels: Sequence[str] | None = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        max_length: int = 0,
        vocabulary: int | None = None,
    ):
        self.labels = None if labels is None else [str(name) for name in labels]
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocabulary = vocabulary
        self._numbers: dict[str, int] = {}  # of the classes that occurred: a look-up reads all names

    @property
    def members(self) -> tuple[str, ...]:
        """The members of a sample that it reads beside the record."""
        return () if self.labels is None else ("cls",)

    def __call__(self, sample: Sample) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Read one sample.

        Returns:
            Tensors of one row each, by their name in the batch; and counters for the data report.

        Raises:
            SampleError: `no-class` where the class is missing or unknown, `no-caption`; see `check_vocabulary`.
        """
        values: dict[str, Tensor] = {}
        counters: dict[str, int] = {}
        if self.labels is not None:
            values["labels"] = torch.tensor(self._label(sample, self.labels))
        if self.tokenizer is not None:
            caption = caption_of(sample.record, sample.seed)
            if caption is None:
                raise SampleError("no-caption", "The record has no caption.")
            ids, mask, cut = _fixed_length(self.tokenizer, caption, self.max_length)
            check_vocabulary(ids.tolist(), self.vocabulary, self.tokenizer)
            values |= {"input_ids": ids, "attention_mask": mask}
            counters |= {"tokens": int(mask.sum()), "truncated": int(cut)}
        return values, counters

    def _label(self, sample: Sample, labels: Sequence[str]) -> int:
        """The class's number, see `class_index`."""
        text = class_name(sample.record, sample.members)
        if text is None:
            raise SampleError("no-class", "The record has no class, and there is no .cls member.")
        if text not in self._numbers:
            try:
                self._numbers[text] = class_index(text, labels)
            except ValueError as error:
                raise SampleError("no-class", f"{error}{nearest(text, labels)}") from error
        return self._numbers[text]


def _fixed_length(tokenizer: "PreTrainedTokenizerBase", text: str, max_length: int) -> tuple[Tensor, Tensor, bool]:
    """Tokenize a caption, with special tokens, and pad it.

    Returns:
        int64 ids `[max_length]`, int64 mask `[max_length]` (1 = token), and whether the caption was cut.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    cut = len(ids) > max_length
    if cut:
        ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
    padded, mask = torch.full((max_length,), pad_id(tokenizer)), torch.zeros(max_length, dtype=torch.int64)
    padded[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    mask[: len(ids)] = 1
    return padded, mask, cut
