"""Causal language models. Legend: B rows, T tokens, D width, S supervised positions, V vocabulary."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError
from mmlab.model.config import LanguageModelConfig
from mmlab.model.pretrained import build_model, load_pretrained, load_tokenizer, load_weights, on_meta, read_config


class LanguageModel(nn.Module):
    """Any `AutoModelForCausalLM`, fed embeddings, with its tokenizer.

    Args:
        config: settings; in `architecture`, `vocab_size` and the special token ids default to the tokenizer's.

    Raises:
        ConfigError: model or tokenizer cannot be loaded, or the tokenizer is not a fast one.
    """

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.settings = config
        # On the meta device nothing is read: a published model is counted without its tokenizer.
        self.tokenizer: Any = None if on_meta() else load_tokenizer(config.tokenizer or config.source)
        defaults = {} if self.tokenizer is None else _token_fields(self.tokenizer)
        causal = read_config(config, "language", **defaults)
        self.causal: Any = build_model(AutoModelForCausalLM, causal, config, attn_implementation=config.attention)
        if self.tokenizer is not None and len(self.tokenizer) > self.config.vocab_size:
            raise ConfigError(
                f"The tokenizer has {len(self.tokenizer)} tokens, the language model only {self.config.vocab_size}."
            )

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def width(self) -> int:
        return self.causal.get_input_embeddings().embedding_dim

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """Embed token ids int64 `[B, T]`: `[B, T, D]`."""
        return self.causal.get_input_embeddings()(input_ids_BT)

    def forward(
        self,
        embeds_BTD: Tensor,
        keep_BT: Tensor,
        segment_ids_BT: Tensor,
        context_ids_BT: Tensor,
        position_ids_BT: Tensor,
        packed: bool,
    ) -> Tensor:
        """Return logits `[S, V]` at the S positions where `keep_BT` is true, row by row.

        The output layer runs only on those. If no row is packed, plain causal attention attends to the same tokens
        (padding is on the right), and the attention kernel needs no mask.
        """
        if packed:
            mask = additive(visible(segment_ids_BT, context_ids_BT), embeds_BTD.dtype)
            packing = {"attention_mask": mask, "position_ids": position_ids_BT}
        else:
            packing = {}
        out = self.causal(inputs_embeds=embeds_BTD, logits_to_keep=keep_BT, use_cache=False, **packing)
        return out.logits

    @torch.no_grad()
    def generate(self, embeds_BTD: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        """Continue left-padded rows with the KV cache; returns new token ids `[B, new]`."""
        return self.causal.generate(
            inputs_embeds=embeds_BTD,
            attention_mask=mask_BT,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )

    def save(self, folder: Path) -> None:
        """Write weights, config and tokenizer as a transformers folder."""
        self.causal.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings."""
        load_pretrained(self.causal, self.settings, "language")

    def load(self, folder: Path) -> None:
        """Fill the weights from a transformers folder; raises ConfigError when they do not fit."""
        load_weights(self.causal, folder)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with this model depends on, apart from its weights."""
        return {"vocabulary": self.config.vocab_size}


def _token_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


def visible(segment_ids_BT: Tensor, context_ids_BT: Tensor) -> Tensor:
    """Return the bool `[B, T, T]` attention mask of packed rows: query i attends to key j.

    A token attends to earlier tokens of its own segment and of its context segment (an image that several questions
    share); padding (segment 0) takes no part.

    Args:
        segment_ids_BT: int64 `[B, T]`, 0 = padding.
        context_ids_BT: int64 `[B, T]`, 0 = no context.
    """
    length = segment_ids_BT.shape[1]
    query, key = segment_ids_BT[:, :, None], segment_ids_BT[:, None, :]
    context = context_ids_BT[:, :, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids_BT.device).tril()
    return causal & (key > 0) & ((key == query) | (key == context))


def additive(mask_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a bool mask to the `[B, 1, T, T]` term that every transformers model adds to its scores.

    Masked scores get the lowest finite number: minus infinity would make the softmax of a padding row NaN.
    """
    bias = torch.zeros(mask_BTT.shape, dtype=dtype, device=mask_BTT.device)
    return bias.masked_fill_(~mask_BTT, torch.finfo(dtype).min)[:, None]


class LanguageOnly(nn.Module):
    """A model whose only part is `language`: a language model is trained and saved like any other part.

    Args:
        language: the language model.
    """

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.language = language
