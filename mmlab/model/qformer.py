"""BLIP-2's Q-Former: a few learned queries that read an image's features.

Legend: N images, P tokens per image, V vision width, Q queries, T text tokens, D the Q-Former's width.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mmlab.config.errors import ConfigError
from mmlab.model.config import QFormerConfig
from mmlab.model.pretrained import read_config, read_tensors, require_source
from mmlab.runs.disk import to_json
from mmlab.weights import fill

# Names of its tensors in BLIP-2 checkpoints; there the norm is the vision encoder's last one.
NORM = "vision_model.post_layernorm."
NAMES = ("query_tokens", "qformer.", NORM)
# The text's feed-forward layers, which a Q-Former in front of a language model does not have (BLIP-2, section 3.3).
TEXT_LAYER = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


class QFormer(nn.Module):
    """Learned queries, a norm on the vision features, and the transformer in which the queries attend to them (BLIP-2,
    section 3.1).

    Args:
        config: settings; architecture fields that are left out are BLIP-2's.
        vision_width: V, width of the vision features.
        text: with the feed-forward layers for text, which pretraining needs.

    Raises:
        ConfigError: a source that cannot be read, or of another width.
    """

    forward_methods = ("with_text",)

    def __init__(self, config: QFormerConfig, vision_width: int, text: bool):
        super().__init__()
        self.settings = config
        whole = read_config(config, "qformer", model_type="blip_2_qformer", encoder_hidden_size=vision_width)
        self.config: Any = getattr(whole, "qformer_config", whole)
        if not isinstance(self.config, Blip2QFormerConfig):
            raise ConfigError(
                f"model.qformer.source={config.source} is a {whole.model_type}; a BLIP-2 checkpoint has a Q-Former."
            )
        if self.config.encoder_hidden_size != vision_width:
            raise ConfigError(
                f"model.qformer reads features of width {self.config.encoder_hidden_size}, but model.vision gives "
                f"{vision_width}; BLIP-2's Q-Former belongs to model/vision=eva_vit_g."
            )
        self.config.use_qformer_text_input = text
        # transformers' BLIP-2 vision encoders have 1e-6.
        eps = getattr(getattr(whole, "vision_config", None), "layer_norm_eps", 1e-6)
        self.norm = nn.LayerNorm(vision_width, eps=eps)
        # Equal queries would stay equal: each would get the same gradient.
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, self.config.hidden_size))
        nn.init.normal_(self.query_tokens, std=self.config.initializer_range)
        # Of transformers' implementations this one takes a bool mask of any form.
        self.qformer = Blip2QFormerModel._from_config(self.config, attn_implementation="sdpa", dtype=torch.float32)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def tokens_per_image(self) -> int:
        return self.query_tokens.shape[1]

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Return the queries' outputs `[N, Q, D]` for vision features `[N, P, V]`."""
        features, queries = self._normed(features_NPV), self._queries(features_NPV)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def with_text(self, features_NPV: Tensor, embeds_NTD: Tensor, visible_NQTQT: Tensor) -> tuple[Tensor, Tensor]:
        """Run queries and a text in one sequence; only the queries attend to the image.

        Args:
            features_NPV: vision features.
            embeds_NTD: embedded texts, one per image.
            visible_NQTQT: bool `[N, Q + T, Q + T]`, whether position i (queries, then text) attends to position j.

        Returns:
            Outputs of the queries `[N, Q, D]` and of the text `[N, T, D]`.
        """
        queries = self._queries(features_NPV)
        out = self.qformer(
            query_embeds=torch.cat([queries, embeds_NTD.to(queries.dtype)], 1),
            query_length=self.tokens_per_image,
            attention_mask=visible_NQTQT[:, None],
            encoder_hidden_states=self._normed(features_NPV),
        ).last_hidden_state
        return out[:, : self.tokens_per_image], out[:, self.tokens_per_image :]

    def _queries(self, features_NPV: Tensor) -> Tensor:
        return self.query_tokens.expand(len(features_NPV), -1, -1)

    def _normed(self, features_NPV: Tensor) -> Tensor:
        return self.norm(features_NPV.to(self.norm.weight.dtype))

    def save(self, folder: Path) -> None:
        """Write weights under BLIP-2's names and the Q-Former's config: a folder that `source` can name."""
        weights = {_foreign(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(to_json(self.config.to_dict(), indent=2) + "\n")

    def load_pretrained(self) -> None:
        """Fill the weights from the source of the settings; raises ConfigError when they do not fit."""
        if self.settings.init == "pretrained":
            source = require_source(self.settings, "qformer")
            self._fill(read_tensors(source, NAMES, "qformer"), source)

    def load(self, folder: Path) -> None:
        """Fill the weights from a folder that `save` wrote; raises ConfigError when they do not fit."""
        self._fill(load_file(folder / "model.safetensors"), folder)

    def describe(self) -> dict[str, Any]:
        """Return what a connector that was trained with this Q-Former depends on, apart from its weights."""
        return {"queries": self.tokens_per_image}

    def _fill(self, tensors: Mapping[str, Tensor], source: str | Path) -> None:
        text = self.config.use_qformer_text_input
        weights = {name: tensor for name, tensor in tensors.items() if text or not TEXT_LAYER.match(name)}
        queries = weights.get("query_tokens")
        if queries is not None and queries.shape[1] != self.tokens_per_image:
            raise ConfigError(
                f"{source} has {queries.shape[1]} queries, but model.qformer.queries={self.tokens_per_image}."
            )
        fill(self, {name.replace(NORM, "norm."): tensor for name, tensor in weights.items()}, source)


def _foreign(name: str) -> str:
    """Return a weight's name in BLIP-2 checkpoints."""
    return name.replace("norm.", NORM, 1) if name.startswith("norm.") else name


def visible(task: str, text_mask_NT: Tensor, queries: int) -> Tensor:
    """Return the attention mask of a BLIP-2 pretraining task (figure 2 of the paper).

    Args:
        task: `contrast` (queries and text do not attend to each other), `match` (all attend to all) or `caption`
            (queries attend to queries; text to the queries and to earlier text).
        text_mask_NT: int64 or bool `[N, T]`, whether there is a token; nothing else attends to padding.
        queries: Q.

    Returns:
        Bool `[N, Q + T, Q + T]`.
    """
    n, length = text_mask_NT.shape
    is_text = torch.arange(queries + length, device=text_mask_NT.device) >= queries
    rows, columns = is_text[:, None], is_text[None]
    if task == "contrast":
        pairs = rows == columns
    elif task == "caption":
        earlier = torch.ones(len(is_text), len(is_text), dtype=torch.bool, device=is_text.device).tril()
        pairs = ~columns | (rows & earlier)
    else:
        pairs = torch.ones(len(is_text), len(is_text), dtype=torch.bool, device=is_text.device)
    present = torch.cat([torch.ones(n, queries, dtype=torch.bool, device=is_text.device), text_mask_NT.bool()], 1)
    # Each position attends to itself at least: the softmax of an empty row is NaN.
    return pairs & present[:, None] | torch.eye(len(is_text), dtype=torch.bool, device=is_text.device)
