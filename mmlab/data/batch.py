"""The batches that stages receive. Legend: B rows, T tokens, N pictures, H/W pixels."""

from typing import Any, TypedDict

from torch import Tensor

IGNORE = -100
"""Label of a token without loss (the ignore index of torch's cross-entropy)."""


class ChatBatch(TypedDict):
    """Rows of one or more segments (packing is many segments in a row).

    A token sees an earlier token of its own segment, and of the segment that `context_ids` names:
    several questions about one picture share the picture's tokens.
    """

    input_ids: Tensor  # int64 [B, T]; the pad id at picture places
    position_ids: Tensor  # int64 [B, T]; restarts per segment, continues after the context's length
    segment_ids: Tensor  # int64 [B, T]; 0 = padding
    context_ids: Tensor  # int64 [B, T]; 0 = none
    labels: Tensor  # int64 [B, T]; IGNORE where there is no loss, else the token at this place
    pixel_values: Tensor  # uint8 [N, 3, H, W]
    image_positions: Tensor  # int64 [N, 2]: row and first token of each picture
    image_keys: list[str]
    packed: bool  # whether a row has more than one segment; set by the stage, on the host
    keys: list[str]
    stats: dict[str, dict[str, int]]
    bad: list[dict[str, Any]]


class PairBatch(TypedDict):
    """Pictures with one caption each, for contrastive pretraining."""

    pixel_values: Tensor  # uint8 [B, 3, H, W]
    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T]; 1 = token
    keys: list[str]
    stats: dict[str, dict[str, int]]
    bad: list[dict[str, Any]]
