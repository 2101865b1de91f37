"""BLIP-2's Q-Former: a few learned queries that read a picture's features.

Legend: N pictures, P tokens per picture, V vision width, Q queries, T text tokens, D the Q-Former's width.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint import on_meta, read_config, read_tensors
from mmlab.weights import fill

# Names of its tensors in BLIP-2 checkpoints; there the norm is the vision encoder's last one.
NORM = "vision_model.post_layernorm."
NAMES = ("query_tokens", "qformer.", NORM)
# The text's feed-forward layers, which stay behind when the Q-Former goes to a language model (BLIP-2, section 3.3).
TEXT_LAYER = re.compile(r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\.")


class QFormer(nn.Module):
    """Learned queries, the norm on the vision features, and the transformer in which the queries read them
    (BLIP-2, section 3.1).

    Args:
        vision_width: V, width of the vision features.
        source: hub name or local folder of a BLIP-2 checkpoint; or the artifact of a run.
        init: `pretrained`, or `random` to build `architecture` with random weights.
        architecture: fields of transformers' `Blip2QFormerConfig`; those left out are BLIP-2's.
        queries: Q, how many tokens a picture becomes; BLIP-2 has 32.
        text: with the feed-forward layers of texts, which pretraining needs.

    Raises:
        ConfigError: a source that cannot be loaded, or of other widths or another number of queries.
    """

    def __init__(
        self,
        vision_width: int,
        source: str | None = None,
        init: str = "pretrained",
        architecture: Mapping[str, Any] | None = None,
        queries: int = 32,
        text: bool = False,
    ):
        super().__init__()
        fields = {"model_type": "blip_2_qformer", "encoder_hidden_size": vision_width, **(architecture or {})}
        whole = read_config(source, fields, init, "qformer")
        config: Any = getattr(whole, "qformer_config", whole)
        if not isinstance(config, Blip2QFormerConfig):
            raise ConfigError(
                f"model.qformer.source={source} is a {whole.model_type}; a BLIP-2 checkpoint has a Q-Former."
            )
        if config.encoder_hidden_size != vision_width:
            raise ConfigError(
                f"model.qformer reads features of width {config.encoder_hidden_size}, but model.vision gives "
                f"{vision_width}; BLIP-2's Q-Former belongs to model/vision=eva_vit_g."
            )
        config.use_qformer_text_input = text
        self.config = config
        # 1e-6 is what transformers' BLIP-2 vision encoders have.
        eps = getattr(getattr(whole, "vision_config", None), "layer_norm_eps", 1e-6)
        self.norm = nn.LayerNorm(vision_width, eps=eps)
        # Queries that start equal would stay equal: each gets the same gradient.
        self.query_tokens = nn.Parameter(torch.empty(1, queries, config.hidden_size))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        # Of transformers' implementations this one takes a bool mask of any form.
        self.qformer = Blip2QFormerModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        if init == "pretrained" and not on_meta():
            assert source is not None, "read_config refuses a missing source"
            self._fill(read_tensors(source, NAMES, "qformer"), source)

    @property
    def width(self) -> int:
        return self.config.hidden_size

    @property
    def tokens_per_image(self) -> int:
        return self.query_tokens.shape[1]

    def forward(self, features_NPV: Tensor) -> Tensor:
        """Vision features `[N, P, V]` → what the queries read, `[N, Q, D]`."""
        features, queries = self._normed(features_NPV), self._queries(features_NPV)
        return self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state

    def with_text(self, features_NPV: Tensor, embeds_NTD: Tensor, visible_NQTQT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and a text in one sequence; only the queries read the picture.

        Args:
            features_NPV: vision features.
            embeds_NTD: embedded texts, one per picture.
            visible_NQTQT: bool `[N, Q + T, Q + T]`, whether place i (queries, then text) sees place j.

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
        """Write weights under BLIP-2's names and the Q-Former's config: `source` takes the folder."""
        weights = {_foreign(name): tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Fill the weights from a folder that `save` wrote; raises ConfigError when they do not fit."""
        self._fill(load_file(folder / "model.safetensors"), folder)

    def describe(self) -> dict[str, Any]:
        """What a connector that was trained beside this Q-Former depends on, apart from its weights."""
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
    """A weight's name in BLIP-2 checkpoints."""
    return name.replace("norm.", NORM, 1) if name.startswith("norm.") else name


def visible(task: str, text_mask_NT: Tensor, queries: int) -> Tensor:
    """Who sees whom in each of BLIP-2's pretraining tasks (figure 2 of the paper).

    Args:
        task: `contrast` (queries and text see nothing of each other), `match` (all see all) or `caption`
            (queries see queries; text sees the queries and the text before it).
        text_mask_NT: int64 or bool `[N, T]`, whether there is a token; padding is seen by no other place.
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
    there = torch.cat([torch.ones(n, queries, dtype=torch.bool, device=is_text.device), text_mask_NT.bool()], 1)
    # A place sees itself at least: a row of the mask without any would give no number.
    return pairs & there[:, None] | torch.eye(len(is_text), dtype=torch.bool, device=is_text.device)
