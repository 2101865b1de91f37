"""Export of a trained prior over codes as a folder of diffusers' VQModel, transformers' GPT-2, a card and a loader.

Legend: K codes, V tokens of the vocabulary, D width.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.export.diffusers_modules import autoencoder, named
from mmlab.export.diffusion_export import copy_code
from mmlab.model.code_gpt import Block, CodeGPT
from mmlab.model.code_prior_model import CodePriorModel
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.conditioner import ClassCondition, TextCondition
from mmlab.runs.disk import to_json

CONTEXT = "context.safetensors"
LOADER = "mmlab.export.code_pipeline"
"""Its file is copied into the folder as loader.py; it needs only torch, diffusers and transformers."""


def export_prior(model: CodePriorModel, sampler: CodeSampler, size: int, out: Path) -> str:
    """Write the folder, and return the line that loads it.

    The transformer becomes GPT-2. Classes, codes of maps and the start become tokens after the K codes; only texts
    remain embeddings, of their encoder and a linear layer.

    Args:
        model: the trained model.
        sampler: of the run, for the card.
        size: side of the images.
        out: the folder.

    Raises:
        ConfigError: rotary positions, which GPT-2 does not have, or a quantizer that diffusers does not have.
    """
    prior, conditioner = model.prior, model.conditioner
    if prior.positions is None:
        raise ConfigError(
            "transformers' GPT-2 has learned positions, but this run's prior has model.prior.positions=rotary; its"
            " weights are in the run's artifacts/prior."
        )
    # Before the first file is written: an error should not leave half a folder.
    stages = {"first_stage": autoencoder(model.first_stage)}
    if model.map_stage is not None:
        stages["map_stage"] = autoencoder(model.map_stage)
    front = _front_tokens(model)
    start = len(prior.embed.weight) + len(front) if prior.start is not None else None
    if prior.start is not None:
        front = torch.cat([front, prior.start.detach()[None]])
    gpt2(prior, front, start).save_pretrained(out / "prior")
    for name, stage in stages.items():
        stage.save_pretrained(out / name)
    card: dict[str, Any] = {
        "reads": conditioner.reads,
        "codes": prior.codes,
        "side": prior.side,
        "size": size,
        "first_token": prior.codes,
        "start": start,
        "sampler": {name: value for name, value in vars(sampler.config).items() if not name.startswith("_")},
    }
    if isinstance(conditioner, ClassCondition):
        card["classes"] = conditioner.names
    if isinstance(conditioner, TextCondition):
        conditioner.save(out / "text_encoder")
        assert prior.context is not None
        save_file({name: value.contiguous() for name, value in prior.context.state_dict().items()}, out / CONTEXT)
        card |= conditioner.describe()
    (out / "card.json").write_text(to_json(card, indent=2) + "\n", encoding="utf-8")
    copy_code(LOADER, out / "loader.py")
    return f'Pipeline("{out}")  # from {out}/loader.py'


@torch.no_grad()
def _front_tokens(model: CodePriorModel) -> Tensor:
    """Return the embeddings of classes or codes of maps, and of none, as tokens in front: `[V - K, D]`."""
    prior, conditioner = model.prior, model.conditioner
    layer = prior.vector if prior.vector is not None else prior.context
    if conditioner.reads in ("class", "map"):
        assert layer is not None
        table: Any = conditioner.embedding
        return layer(table.weight)
    return prior.embed.weight[:0]


@torch.no_grad()
def gpt2(prior: CodeGPT, front: Tensor, start: int | None) -> Any:
    """Convert the transformer to `GPT2LMHeadModel`, with the tokens in front after the codes, never to be generated.

    Args:
        prior: with learned positions.
        front: embeddings of these tokens, `[V - K, D]`.
        start: the token that begins an image, if there is one.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    assert prior.positions is not None
    config = GPT2Config(
        vocab_size=prior.codes + len(front),
        n_positions=prior.room,
        n_embd=prior.width,
        n_layer=len(prior.blocks),
        n_head=prior.heads,
        activation_function="gelu",
        tie_word_embeddings=False,
        bos_token_id=start,
        eos_token_id=None,
    )
    exported = GPT2LMHeadModel(config)
    weights = {
        "transformer.wte.weight": torch.cat([prior.embed.weight, front]),
        "transformer.wpe.weight": prior.positions,
        "transformer.ln_f.weight": prior.norm.weight,
        "transformer.ln_f.bias": prior.norm.bias,
        "lm_head.weight": torch.cat([prior.head.weight, torch.zeros_like(front)]),
    }
    for number, block in enumerate(prior.blocks):
        assert isinstance(block, Block)
        weights |= _block(block, f"transformer.h.{number}")
    exported.load_state_dict(weights)
    settings: Any = exported.generation_config
    settings.suppress_tokens = list(range(prior.codes, config.vocab_size)) or None
    settings.max_new_tokens = prior.side * prior.side
    settings.pad_token_id = 0
    return exported.eval()


def _block(block: Block, prefix: str) -> dict[str, Tensor]:
    """Return one block's weights under transformers' names; GPT-2 keeps its matrices transposed."""
    parts = (block.query, block.key, block.value)
    weights = {
        f"{prefix}.attn.c_attn.weight": torch.cat([part.weight for part in parts]).T,
        f"{prefix}.attn.c_attn.bias": torch.cat([part.bias for part in parts]),
        **named(block.norm, f"{prefix}.ln_1"),
        **named(block.mlp_norm, f"{prefix}.ln_2"),
    }
    matrices: dict[str, nn.Module] = {"attn.c_proj": block.out, "mlp.c_fc": block.mlp[0], "mlp.c_proj": block.mlp[2]}
    for name, layer in matrices.items():
        weights |= {
            key: value.T if value.ndim == 2 else value for key, value in named(layer, f"{prefix}.{name}").items()
        }
    return weights
