"""DiTs of diffusers checkpoints as ours, weight by weight. Legend: C channels, K classes, D width."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.diffusers_source import Place, place_of, read_model

KINDS = ("DiTTransformer2DModel", "Transformer2DModel")
TIME = "norm1.emb.timestep_embedder"
TABLE = "norm1.emb.class_embedder.embedding_table.weight"
BLOCK = {
    "modulation": "norm1.linear",
    "query": "attn1.to_q",
    "key": "attn1.to_k",
    "value": "attn1.to_v",
    "out": "attn1.to_out.0",
    "mlp.0": "ff.net.0.proj",
    "mlp.2": "ff.net.2",
}
"""Layer of our block → its name in diffusers' block."""


def dit_place(source: str) -> Place:
    """Return where a DiT is: the source, or a part of this pipeline."""
    return place_of(source, ("transformer", "denoiser"), "denoiser", "a DiT")


def read_dit(source: str, here: Mapping[str, int]) -> dict[str, Tensor]:
    """Read a DiT's weights under our names.

    Where it predicts a variance, too, as the released models do, that half of its output is left out: sampling does not
    use it, nor does our loss train it. All blocks of such models embed the time alike, so one embedding is kept.

    Args:
        source: of the settings.
        here: our `channels`, `depth`, `width`, `heads` and `patch`.

    Raises:
        ConfigError: a source that cannot be read, a DiT of other sizes, or one whose blocks embed the time differently.
    """
    place = dit_place(source)
    theirs = _sizes(place)
    if theirs != dict(here):
        name = next(name for name in here if theirs[name] != here[name])
        fix = f"set model.denoiser.{name}={theirs[name]}"
        fix = "take model.first_stage.source from the same pipeline" if name == "channels" else fix
        raise ConfigError(f"{place.key}={place} has {name}={theirs[name]}, not {here[name]}; {fix}.")
    stored, patch = _weights(place), here["patch"]
    layers = {"time.0": f"transformer_blocks.0.{TIME}.linear_1", "time.2": f"transformer_blocks.0.{TIME}.linear_2"}
    layers |= {"final.modulation": "proj_out_1", "final.linear": "proj_out_2", "embed": "pos_embed.proj"}
    for i in range(here["depth"]):
        layers |= {f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{theirs}" for ours, theirs in BLOCK.items()}
        _require_equal(place, stored, i, (f"{TIME}.linear_1.weight", f"{TIME}.linear_2.weight"), "time")
    both = ("weight", "bias")
    weights = {f"{ours}.{kind}": stored[f"{name}.{kind}"] for ours, name in layers.items() for kind in both}
    # Their convolution's kernel is channel, row, column; our patches are row, column, channel.
    weights["embed.weight"] = weights["embed.weight"].permute(0, 2, 3, 1).flatten(1)
    for kind in both:
        values = weights[f"final.linear.{kind}"].unflatten(0, (patch * patch, -1))
        weights[f"final.linear.{kind}"] = values[:, : here["channels"]].flatten(0, 1).contiguous()
    return weights


def dit_classes(source: str) -> Tensor:
    """Return a DiT's embeddings of classes, float32 `[K + 1, D]`, of no class in the last row."""
    place = dit_place(source)
    depth, stored = _sizes(place)["depth"], _weights(place)
    for i in range(depth):
        _require_equal(place, stored, i, (TABLE,), "class")
    return stored[f"transformer_blocks.0.{TABLE}"]


def _require_equal(place: Place, stored: Mapping[str, Tensor], i: int, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if not stored[f"transformer_blocks.{i}.{name}"].equal(stored[f"transformer_blocks.0.{name}"]):
            raise ConfigError(
                f"{place.key}={place} embeds the {what} in block {i} as no DiT does: all blocks share it."
            )


def _sizes(place: Place) -> dict[str, int]:
    fields: dict[str, Any] = place.config(*KINDS)
    if fields.get("norm_type") != "ada_norm_zero":
        raise ConfigError(f"{place.key}={place} is not a DiT: its norm_type is {fields.get('norm_type')}.")
    heads = fields["num_attention_heads"]
    return {
        "channels": fields["in_channels"],
        "depth": fields["num_layers"],
        "width": heads * fields["attention_head_dim"],
        "heads": heads,
        "patch": fields["patch_size"],
    }


def _weights(place: Place) -> dict[str, Tensor]:
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return dict(read_model(DiTTransformer2DModel, place)[0].state_dict())
