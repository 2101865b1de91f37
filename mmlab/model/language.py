"""Causal language models. Legend: B rows, T tokens, D width, S supervised places, V vocabulary."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError
from mmlab.model.attention import additive, visible
from mmlab.model.checkpoint import build_pretrained, load_weights, on_meta, read_config, refuse_code


class LanguageModel(nn.Module):
    """Any `AutoModelForCausalLM`, fed embeddings, with its tokenizer.

    Args:
        source: hub name or local folder.
        init: `pretrained`, or `random` to build `architecture` with random weights.
        architecture: transformers config fields for random weights; `vocab_size` and the special token
            ids default to the tokenizer's.
        tokenizer: hub name or local folder; the source's own when None.
        attention: transformers' attention implementation.

    Raises:
        ConfigError: model or tokenizer cannot be loaded, or the tokenizer is not a fast one.
    """

    def __init__(
        self,
        source: str | None = None,
        init: str = "pretrained",
        architecture: dict[str, Any] | None = None,
        tokenizer: str | None = None,
        attention: str = "sdpa",
    ):
        super().__init__()
        architecture = dict(architecture or {})
        # On the meta device nothing is read: a published model is counted without its tokenizer.
        self._tokenizer = None if on_meta() else load_tokenizer(tokenizer or source)
        if self._tokenizer is not None and init == "random":
            architecture = {**_token_fields(self._tokenizer), **architecture}
        config = read_config(source, architecture, init, "language")
        self.causal: Any = build_pretrained(
            AutoModelForCausalLM, config, source, init, "language", attn_implementation=attention
        )
        if self._tokenizer is not None and len(self._tokenizer) > self.config.vocab_size:
            raise ConfigError(
                f"The tokenizer has {len(self._tokenizer)} tokens, the language model only {self.config.vocab_size}."
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        assert self._tokenizer is not None, "a model on the meta device has no tokenizer"
        return self._tokenizer

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def width(self) -> int:
        return self.causal.get_input_embeddings().embedding_dim

    def embed(self, input_ids_BT: Tensor) -> Tensor:
        """Token ids `[B, T]` → embeddings `[B, T, D]`."""
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
        """Return logits `[S, V]` at the S places where `keep_BT` is true, in row-major order.

        The output layer runs on those places only. When no row is packed, plain causal attention sees the
        same tokens (padding lies on the right), and the attention kernel needs no mask.
        """
        if packed:
            mask = additive(visible(segment_ids_BT, context_ids_BT), embeds_BTD.dtype)
            where = {"attention_mask": mask, "position_ids": position_ids_BT}
        else:
            where = {}
        out = self.causal(inputs_embeds=embeds_BTD, logits_to_keep=keep_BT, use_cache=False, **where)
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

    def load(self, folder: Path) -> None:
        """Fill the weights from a transformers folder; raises ConfigError when they do not fit."""
        load_weights(self.causal, folder)

    def describe(self) -> dict[str, Any]:
        """What a connector that was trained beside this model depends on, apart from its weights."""
        return {"vocabulary": self.config.vocab_size}


def load_tokenizer(source: str | None, part: str = "language") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; a missing pad token becomes the end token (padding is never attended to).

    Args:
        source: hub name or local folder.
        part: name of the part that it belongs to, for messages.

    Raises:
        ConfigError: no source, unreadable, or without character offsets (not a fast tokenizer).
    """
    if source is None:
        raise ConfigError(f"model.{part}.tokenizer is not set; give a hub name or a folder with tokenizer.json.")
    refuse_code(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"The tokenizer {source} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"The tokenizer {source} is not a fast one; labels need its character offsets.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _token_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


class LanguageOnly(nn.Module):
    """A model whose one part is `language`, so that a language model is trained and saved like any part.

    Args:
        language: the language model.
    """

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.language = language
