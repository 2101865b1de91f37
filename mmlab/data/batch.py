"""The batches that stages receive.

Legend: B rows, T tokens, N pictures, K tiles (a square picture is one), P features of a tile, M places of pictures,
H/W pixels, C/h/w sizes of latents.

The reader adds `keys` (one per sample), `stats` (counters per source) and `bad` (replaced samples) to every batch.
"""

from typing import Any, NotRequired, TypedDict

from torch import Tensor

IGNORE = -100
"""Label of a token without loss (the ignore index of torch's cross-entropy)."""


class ChatBatch(TypedDict):
    """Rows of one or more segments (packing is many segments in a row).

    A token sees the earlier tokens of its own segment, and those of the segment that `context_ids` names:
    several questions about one image share its tokens.
    """

    input_ids: Tensor  # int64 [B, T]; the pad id at the places of images
    position_ids: Tensor  # int64 [B, T]; restarts per segment, continues after the context's length
    segment_ids: Tensor  # int64 [B, T]; 0 = padding
    context_ids: Tensor  # int64 [B, T]; 0 = none
    labels: Tensor  # int64 [B, T]; IGNORE where there is no loss, else the token at this place
    pixel_values: Tensor  # uint8 [K, 3, H, W]; the tiles of all pictures
    image_positions: Tensor  # int64 [M, 2]: row and column of each place of a picture
    image_features: Tensor  # int64 [M]: which of the K * P features each place takes; K * P stands for the newline
    image_keys: list[str]  # K, one per tile, unique over all shards
    packed: Any  # whether a row has more than one segment, or a `Layout` of them; set by the stage, on the host
    keys: list[str]
    stats: dict[str, dict[str, int]]
    bad: list[dict[str, Any]]


class PairBatch(TypedDict):
    """Images with one caption each, for contrastive pretraining."""

    pixel_values: Tensor  # uint8 [B, 3, H, W]
    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]; 1 = token
    keys: list[str]
    stats: dict[str, dict[str, int]]
    bad: list[dict[str, Any]]


class ConditionedBatch(TypedDict):
    """Conditioning of a generative model, and the seeds of everything that is drawn for its samples."""

    seeds: Tensor  # int64 [B]
    labels: NotRequired[Tensor]  # int64 [B]; of classes
    input_ids: NotRequired[Tensor]  # int64 [B, T]; of captions, padded to the same T in every batch
    attention_mask: NotRequired[Tensor]  # int64 [B, T]; 1 = token
    keys: list[str]
    stats: dict[str, dict[str, int]]
    bad: list[dict[str, Any]]


class ImageBatch(ConditionedBatch):
    """Images to encode or to generate."""

    pixel_values: Tensor  # uint8 [B, 3, H, W]
    map_pixels: NotRequired[Tensor]  # uint8 [B, 3, H, W]; of the images' maps


class LatentBatch(ConditionedBatch):
    """Latents of images as posteriors of a first stage, so that each visit draws another sample."""

    mean: Tensor  # float32 [B, C, h, w]; raw latents, not normalized
    logvar: NotRequired[Tensor]  # float32 [B, C, h, w]; absent for a deterministic first stage
    pixel_values: NotRequired[Tensor]  # uint8 [B, 3, H, W], mirrored as the latents; for an alignment


class CodeBatch(ConditionedBatch):
    """Codes that a first stage made of images."""

    codes: Tensor  # int64 [B, h, w]
    map_codes: NotRequired[Tensor]  # int64 [B, h, w]; of the images' maps, by a first stage of their own
