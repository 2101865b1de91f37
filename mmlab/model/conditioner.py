"""Conditioners: embed classes, texts or maps for a denoiser or a prior.

A condition is a dict with any of `vector [B, D]` (added to the time embedding), `context [B, T, D]` and its bool
`mask [B, T]` (for cross-attention; without a mask all of it is attended to). Conditions are dropped only here: a
dropped row is the null row, which `null` returns for unconditional sampling.

Legend: B images, T tokens, D width.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForTextEncoding, PretrainedConfig

from mmlab.class_names import class_index
from mmlab.config.errors import ConfigError, nearest
from mmlab.model.config import ClassConditionConfig, MapConditionConfig, TextConditionConfig
from mmlab.model.diffusers_classes import read_classes
from mmlab.model.pretrained import (
    build_model,
    load_pretrained,
    load_weights,
    read_config,
)
from mmlab.model.pretrained_tokenizer import find_tokenizer, fit_tokenizer
from mmlab.model.text_source import in_pipeline, without_pooler
from mmlab.runs.disk import to_json
from mmlab.weights import fill

CLASSES, WEIGHTS = "classes.json", "model.safetensors"
Condition = dict[str, Tensor]


class Conditioner(nn.Module, ABC):
    """Base of conditioners.

    Attributes:
        reads: the fields of a batch that it needs: `none`, `class`, `text` or `map`.
        dropout: probability that training replaces an image's condition by the null one; the caller draws the numbers
            and passes the rows to `forward`.
        vector_width: D of `vector`, None for a condition without one.
        context_width: D of `context`, likewise.
        context_length: T of `context`; None for a token at each position of the latents.
        untrained: whether its weights start random, which makes it useless while frozen.
    """

    reads: str
    dropout: float = 0.0
    vector_width: int | None = None
    context_width: int | None = None
    context_length: int | None = None
    untrained: bool = False

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """Embed the condition of a batch.

        Args:
            batch: with the fields that `reads` names; others are ignored.
            drop_B: bool `[B]`, rows that get the null condition; None drops none.
        """

    @abstractmethod
    def null(self, count: int, device: torch.device | str) -> Condition:
        """Return the condition of `count` dropped rows."""


class NoCondition(Conditioner):
    """Unconditional: an empty condition."""

    reads = "none"

    def forward(self, batch: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        return {}

    def null(self, count: int, device: torch.device | str) -> Condition:
        return {}


class ClassCondition(Conditioner):
    """One learned embedding per class, and one more for no class (classifier-free guidance, arXiv 2207.12598, section
    3.2), which is row `len(names)`. They start normal, with standard deviation 0.02.

    Args:
        config: settings. With `as_context` the condition is `context [B, 1, D]` (latent diffusion's ImageNet models:
            1001 rows of width 512) instead of `vector [B, D]`.

    Raises:
        ConfigError: no classes, or a name twice.
    """

    reads = "class"

    def __init__(self, config: ClassConditionConfig):
        super().__init__()
        self.settings, self.untrained = config, config.source is None
        classes, width = config.classes, config.width
        named = isinstance(classes, Sequence) and not isinstance(classes, str) and len(classes) > 0
        counted = isinstance(classes, int) and not isinstance(classes, bool) and classes > 0
        if not (named or counted):
            raise ConfigError(f"model.conditioner.classes={classes!r} must be their number or the list of their names.")
        self.names = [str(name) for name in (range(classes) if isinstance(classes, int) else classes)]
        if twice := next((name for name in self.names if self.names.count(name) > 1), None):
            raise ConfigError(f"model.conditioner.classes names '{twice}' twice.")
        self.dropout, self.as_context = config.dropout, config.as_context
        self.vector_width, self.context_width = (None, width) if self.as_context else (width, None)
        self.context_length = 1 if self.as_context else None
        self.embedding = nn.Embedding(len(self.names) + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def index(self, name: str | int) -> int:
        """Return the index of a class, see `class_index`; raises ConfigError if there is no such class."""
        try:
            return class_index(name, self.names)
        except ValueError as error:
            few = f" Classes: {', '.join(self.names)}." if len(self.names) <= 12 else ""
            raise ConfigError(f"There is no class '{name}'.{nearest(str(name), self.names)}{few}") from error

    def forward(self, batch: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """`batch["labels"]`: int64 `[B]`."""
        labels_B = batch["labels"]
        if drop_B is not None:
            labels_B = torch.where(drop_B, len(self.names), labels_B)
        rows = self.embedding(labels_B)
        return {"context": rows[:, None]} if self.as_context else {"vector": rows}

    def null(self, count: int, device: torch.device | str) -> Condition:
        return self({"labels": torch.full((count,), len(self.names), device=device)})

    def load_pretrained(self) -> None:
        """Fill the embeddings from the source of the settings, if any.

        Raises:
            ConfigError: it has none, or of other classes.
        """
        if self.settings.source is not None:
            table, names = read_classes(self.settings.source, len(self.names))
            if isinstance(self.settings.classes, int) or names is None:
                names = self.names
            if names != self.names:
                raise ConfigError(f"{self.settings.source} has other classes: {_difference(names, self.names)}.")
            fill(self, {"embedding.weight": table}, self.settings.source)

    def save(self, folder: Path) -> None:
        """Write the embeddings, and the names that they belong to."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLASSES).write_text(to_json(self.names, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / WEIGHTS)

    def load(self, folder: Path) -> None:
        """Fill the embeddings from a folder of `save`.

        Raises:
            ConfigError: embeddings of other classes, or of the same classes in another order.
        """
        try:
            names = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{folder} does not hold the embeddings of classes: {error}.") from error
        if names != self.names:
            raise ConfigError(f"{folder} was trained with other classes: {_difference(names, self.names)}.")
        fill(self, weights, folder)

    def describe(self) -> dict[str, Any]:
        """Return what a denoiser or a prior that was trained with these classes depends on, apart from the weights."""
        return {"classes": self.names}


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Say how two lists of classes differ, and how to get the first one."""
    if len(theirs) <= 12:
        return f"set model.conditioner.classes=[{','.join(theirs)}], in this order, not [{','.join(ours)}]"
    if len(theirs) != len(ours):
        return f"it has {len(theirs)} classes, and model.conditioner.classes {len(ours)}"
    n = next(n for n, (their, our) in enumerate(zip(theirs, ours, strict=True)) if their != our)
    return f"its class {n}, counted from 0, is '{theirs[n]}', and in model.conditioner.classes '{ours[n]}'"


class TextCondition(Conditioner):
    """The last hidden states of a transformers text encoder (CLIP, T5, BERT, …), of rows padded to `max_length`.

    A dropped row is the encoding of the empty text, which pipelines of Stable Diffusion use as their null condition.

    Args:
        config: settings; in `architecture`, `vocab_size` defaults to the tokenizer's. Models on T5 use `hide_padding`;
            Latent and Stable Diffusion attend to the padding, and their pipelines have no mask. The source may be a
            pipeline of diffusers with a text encoder and a tokenizer.

    Raises:
        ConfigError: encoder or tokenizer cannot be loaded, or the encoder has too few positions or tokens.
    """

    reads = "text"

    def __init__(self, config: TextConditionConfig):
        super().__init__()
        self.settings, config = config, in_pipeline(config)
        self.tokenizer: Any = find_tokenizer(config.tokenizer or config.source, "conditioner")
        defaults = {}
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "right"  # a causal encoder must not see padding before the text
            defaults = {"vocab_size": len(self.tokenizer)}
        whole = read_config(config, "conditioner", **defaults)
        encoder = getattr(whole, "text_config", whole)
        self._options = without_pooler(encoder)
        self.encoder: Any = build_model(AutoModelForTextEncoding, encoder, config, **self._options)
        self.max_length, self.dropout, self.hide_padding = config.max_length, config.dropout, config.hide_padding
        self.untrained = config.init == "random"
        self.context_width, self.context_length = encoder.hidden_size, config.max_length
        self.vocabulary: int = encoder.vocab_size
        self._check(encoder)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return token ids and attention mask of texts, int64 `[B, T]`, cut and padded to `max_length`.

        Raises:
            ConfigError: a text with a token that the encoder has no embedding of.
        """
        options = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        rows = self.tokenizer(list(texts), return_tensors="pt", return_attention_mask=True, **options)
        if (largest := int(rows["input_ids"].max())) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ConfigError(f"The text encoder has {self.vocabulary} tokens, and '{token}' is not one of them.")
        return {name: rows[name] for name in ("input_ids", "attention_mask")}

    def cut(self, text: str) -> str:
        """Return the end of a text that `tokenize` leaves out, empty if the whole text fits."""
        if len(self.tokenizer(text, verbose=False)["input_ids"]) <= self.max_length:
            return ""
        options = {"truncation": True, "max_length": self.max_length, "return_offsets_mapping": True}
        return text[max(end for _, end in self.tokenizer(text, **options)["offset_mapping"]) :].strip()

    def forward(self, batch: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """`batch["input_ids"]` and `batch["attention_mask"]`: `[B, ≤ T]`, padding on the right."""
        ids, mask = self._padded(batch["input_ids"], batch["attention_mask"])
        if drop_B is not None:
            empty = {name: row.to(ids.device) for name, row in self.tokenize([""]).items()}
            ids = torch.where(drop_B[:, None], empty["input_ids"], ids)
            mask = torch.where(drop_B[:, None], empty["attention_mask"], mask)
        if not self.hide_padding:
            return {"context": self.encoder(input_ids=ids).last_hidden_state}
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return {"context": hidden, "mask": mask.bool()}

    def null(self, count: int, device: torch.device | str) -> Condition:
        one = self({name: row.to(device) for name, row in self.tokenize([""]).items()})
        return {name: row.expand(count, *row.shape[1:]) for name, row in one.items()}

    def save(self, folder: Path) -> None:
        """Write weights, config and tokenizer as a transformers folder."""
        self.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings."""
        settings = in_pipeline(self.settings, weights=True)
        load_pretrained(self.encoder, settings, "conditioner", **self._options)

    def load(self, folder: Path) -> None:
        """Fill the weights from a transformers folder; raises ConfigError when they do not fit."""
        load_weights(self.encoder, folder, **self._options)

    def describe(self) -> dict[str, Any]:
        """Return what a denoiser that was trained with this encoder depends on, apart from its weights."""
        return {"max_length": self.max_length, "hide_padding": self.hide_padding}

    def _padded(self, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Pad rows to T tokens, so that a condition and its null have the same shape."""
        missing = self.max_length - ids_BT.shape[1]
        if missing < 0:
            raise ConfigError(
                f"Texts of {ids_BT.shape[1]} tokens are longer than model.conditioner.max_length={self.max_length}."
            )
        ids = nn.functional.pad(ids_BT, (0, missing), value=self.tokenizer.pad_token_id)
        return ids, nn.functional.pad(mask_BT, (0, missing))

    def _check(self, config: PretrainedConfig) -> None:
        positions = getattr(config, "max_position_embeddings", None) or self.max_length  # T5's are relative
        if positions < self.max_length:
            raise ConfigError(
                f"model.conditioner.max_length={self.max_length}, but the text encoder has {positions} positions."
            )
        if self.tokenizer is not None:
            fit_tokenizer(self.tokenizer, config.vocab_size, "conditioner")


class MapCondition(Conditioner):
    """One token for each code of a map (segmentation, depth), in raster order (Taming Transformers, section 3.2).

    A dropped row is one more embedding, at all positions. Embeddings start normal, with standard deviation 0.02.

    Args:
        config: settings.
    """

    reads = "map"
    untrained = True

    def __init__(self, config: MapConditionConfig):
        super().__init__()
        self.codes, self.dropout, self.context_width = config.codes, config.dropout, config.width
        self.embedding = nn.Embedding(config.codes + 1, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, batch: dict[str, Tensor], drop_B: Tensor | None = None) -> Condition:
        """`batch["map_codes"]`: int64 `[B, h, w]`; the context has h·w tokens."""
        codes_BN = batch["map_codes"].flatten(1)
        if drop_B is not None:
            codes_BN = torch.where(drop_B[:, None], self.codes, codes_BN)
        return {"context": self.embedding(codes_BN)}

    def null(self, count: int, device: torch.device | str) -> Condition:
        """Return one null token per row; dropping rows in `forward` gives as many as a map has."""
        return self({"map_codes": torch.full((count, 1, 1), self.codes, device=device)})
