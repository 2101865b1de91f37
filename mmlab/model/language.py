"""Causal language models. Legend: B rows, T tokens, D width, S supervised positions, V vocabulary."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError
from mmlab.model.attention import choose, described, implementation, rows_mask
from mmlab.model.causal_models import causal_class, pads_left
from mmlab.model.config import LanguageModelConfig
from mmlab.model.exact_buffers import ExactBuffers
from mmlab.model.output_loss import by_chunks, chunked_cross_entropy, summed_cross_entropy
from mmlab.model.packed_rows import separate
from mmlab.model.pretrained import (
    build_model,
    load_pretrained,
    load_weights,
    read_config,
)
from mmlab.model.pretrained_tokenizer import find_tokenizer, fit_tokenizer
from mmlab.model.quantization import dequantize, quantize
from mmlab.model.row_blocks import Layout
from mmlab.weights import content_hash, finite, is_sharded, note_identity


class LanguageModel(ExactBuffers):
    """Any `AutoModelForCausalLM`, fed embeddings, with its tokenizer.

    Args:
        config: settings; in `architecture`, `vocab_size` and the special token ids default to the tokenizer's.

    Attributes:
        ways: sentences about how batches were computed so far.

    Raises:
        ConfigError: model or tokenizer cannot be loaded, or the tokenizer is not a fast one.
    """

    forward_methods = ("embed", "generate", "cross_entropy")

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.settings = config
        self.tokenizer: Any = find_tokenizer(config.tokenizer or config.source)
        defaults = {} if self.tokenizer is None else _token_fields(self.tokenizer)
        causal = read_config(config, "language", **defaults)
        attention = implementation(causal_class(causal), causal.model_type, config.attention)
        try:
            self.causal: Any = build_model(AutoModelForCausalLM, causal, config, attn_implementation=attention)
        except (ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"model.language cannot be built with attention={attention}: {reason}") from error
        if self.tokenizer is not None:
            fit_tokenizer(self.tokenizer, self.vocabulary, "language")
        self.ways: dict[str, None] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(type(self.causal).forward).parameters

    @property
    def config(self) -> Any:
        return self.causal.config

    @property
    def vocabulary(self) -> int:
        """Number of tokens with an embedding; the tokenizer may have fewer, or a few more."""
        return self.config.vocab_size

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
        packed: bool | Layout,
    ) -> Tensor:
        """Return logits `[S, V]` at the S positions where `keep_BT` is true, row by row.

        The output layer runs only on those, where the model can do so. If no row is packed, plain causal attention
        attends to the same tokens (padding is on the right), and the attention kernel needs no mask.

        Args:
            packed: whether a row has several segments; their layout if it was read on the host.
        """
        segments = segment_ids_BT, context_ids_BT, position_ids_BT
        embeds_BTD, keep_BT, options = self._attending(embeds_BTD, keep_BT, *segments, packed)
        return self._logits(embeds_BTD, keep_BT, options)

    def cross_entropy(
        self,
        embeds_BTD: Tensor,
        keep_BT: Tensor,
        targets_S: Tensor,
        segment_ids_BT: Tensor,
        context_ids_BT: Tensor,
        position_ids_BT: Tensor,
        packed: bool | Layout,
    ) -> Tensor:
        """Return the cross-entropy summed over the S positions, in fp32; many logits are computed in chunks.

        Args:
            targets_S: int64, the tokens to predict there. For other arguments see `forward`.
        """
        segments = segment_ids_BT, context_ids_BT, position_ids_BT
        embeds_BTD, keep_BT, options = self._attending(embeds_BTD, keep_BT, *segments, packed)
        wanted, device = self.settings.loss, embeds_BTD.device.type
        if not by_chunks(self.causal, wanted, len(targets_S), embeds_BTD.dtype, device):
            if wanted == "chunked":
                self.ways.setdefault("loss of the language model: loss=chunked cannot run here, so all logits are made")
            return summed_cross_entropy(self._logits(embeds_BTD, keep_BT, options), targets_S)
        self.ways.setdefault("loss of the language model: by chunks of positions, without all logits")
        head = self.causal.get_output_embeddings()
        hidden_BTD = self.causal.base_model(inputs_embeds=embeds_BTD, **options).last_hidden_state
        return chunked_cross_entropy(hidden_BTD[keep_BT], head.weight, head.bias, targets_S)

    def _attending(
        self,
        embeds_BTD: Tensor,
        keep_BT: Tensor,
        segment_ids_BT: Tensor,
        context_ids_BT: Tensor,
        position_ids_BT: Tensor,
        packed: bool | Layout,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The rows as the model reads them: embeddings, the wanted positions, and further arguments."""
        options: dict[str, Any] = {"use_cache": False}
        kind = choose(self.causal, self.settings.attention, packed, embeds_BTD)
        self.ways.setdefault(described(kind, self.settings.attention))
        if kind == "separate":
            embeds_BTD, keep_BT = separate(embeds_BTD, keep_BT, segment_ids_BT, context_ids_BT)
        elif kind != "plain":
            ids = segment_ids_BT, context_ids_BT, position_ids_BT
            mask = rows_mask(kind, self.config, packed, *ids, embeds_BTD.dtype)
            options |= {"attention_mask": mask, "position_ids": position_ids_BT}
        return embeds_BTD, keep_BT, options

    def _logits(self, embeds_BTD: Tensor, keep_BT: Tensor, options: dict[str, Any]) -> Tensor:
        if self._keeps_logits:
            return self.causal(inputs_embeds=embeds_BTD, logits_to_keep=keep_BT, **options).logits
        return self.causal(inputs_embeds=embeds_BTD, **options).logits[keep_BT]

    @torch.no_grad()
    def generate(self, embeds_BTD: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        """Continue left-padded rows with the KV cache; returns new token ids `[B, new]`, padded on the right.

        Models that padding would disturb continue rows of equal length together, without padding. Ranks that share
        sharded weights may have different rows, but have to call this equally often.

        Raises:
            RunError: logits that are not finite, of which any token would be the answer.
        """
        with self._in_step(embeds_BTD), self._finite_logits():
            return self._generate(embeds_BTD, mask_BT, **options)

    def _generate(self, embeds_BTD: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
        pad = self.tokenizer.pad_token_id
        options["synced_gpus"] = False  # `_in_step` synchronizes, also where ranks have other numbers of calls
        if pads_left(self.config):
            return self.causal.generate(inputs_embeds=embeds_BTD, attention_mask=mask_BT, pad_token_id=pad, **options)
        rows: dict[int, Tensor] = {}
        lengths = mask_BT.sum(1).tolist()
        for length in sorted(set(lengths)):
            same = [row for row, other in enumerate(lengths) if other == length]
            embeds, mask = embeds_BTD[same, -length:], mask_BT[same, -length:]
            new = self.causal.generate(inputs_embeds=embeds, attention_mask=mask, pad_token_id=pad, **options)
            rows |= dict(zip(same, new, strict=True))
        return pad_sequence([rows[row] for row in range(len(rows))], batch_first=True, padding_value=pad)

    @contextmanager
    def _finite_logits(self) -> Iterator[None]:
        """Note the highest logit of each step, and raise RunError afterwards if one is not finite."""
        highest: list[Tensor] = []
        note = self.causal.register_forward_hook(lambda *call: highest.append(call[-1].logits[:, -1].amax(-1)))
        try:
            yield
        finally:
            note.remove()
        if highest:
            finite(torch.cat(highest), "The language model's logits have")

    @contextmanager
    def _in_step(self, embeds_BTD: Tensor) -> Iterator[None]:
        """If the weights are sharded, run the model until every rank is done: each run gathers weights from all ranks.

        Even with equal rows, the ranks' texts may end at different tokens: GPUs do not round alike.
        """
        if not any(map(is_sharded, self.parameters())):
            yield
            return

        def any_runs(here: int) -> bool:
            count = torch.tensor(here, device=embeds_BTD.device)
            distributed.all_reduce(count)
            return bool(count)

        def announce(*_: Any) -> None:
            any_runs(1)

        announcing = self.causal.register_forward_pre_hook(announce)
        try:
            yield
        finally:
            announcing.remove()
        while any_runs(0):
            self.causal(inputs_embeds=embeds_BTD[:1, -1:], use_cache=False)

    def save(self, folder: Path) -> None:
        """Write weights, config and tokenizer as a transformers folder."""
        self.causal.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings."""
        with self._rounded():
            load_pretrained(self.causal, self.settings, "language", self.settings.quantize is not None)

    def load(self, folder: Path) -> None:
        """Fill the weights from a transformers folder; raises ConfigError when they do not fit."""
        with self._rounded():
            load_weights(self.causal, folder, self.settings.quantize is not None)

    @contextmanager
    def _rounded(self) -> Iterator[None]:
        """Round what is read meanwhile to 4 bits, if the settings say so; what is not rounded keeps its dtype."""
        dtype = self.causal.dtype
        yield
        if self.settings.quantize is None or self.causal.device.type == "meta":
            return
        note_identity(self, content_hash(self))
        quantize(self.causal, dtype)

    def dequantize(self) -> None:
        """Turn 4-bit weights, if there are any, into plain ones of the same values."""
        if getattr(self.causal, "is_loaded_in_4bit", False):
            dequantize(self.causal)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with this model depends on, apart from its weights."""
        return {"vocabulary": self.vocabulary}


def _token_fields(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {"vocab_size": len(tokenizer), **{name: value for name, value in ids.items() if value is not None}}


class LanguageOnly(nn.Module):
    """A model whose only part is `language`: a language model is trained and saved like any other part.

    Args:
        language: the language model.
    """

    def __init__(self, language: LanguageModel):
        super().__init__()
        self.language = language

    @torch.no_grad()
    def generate(
        self,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        pixels_K3HW: Tensor,
        positions_M2: Tensor,
        chosen_M: Tensor,
        **options: Any,
    ) -> Tensor:
        """Answer left-padded prompts without images, see `VisionLanguageModel.generate`."""
        assert len(pixels_K3HW) == 0
        return self.language.generate(self.language.embed(input_ids_BT), mask_BT, **options)
