"""Pipelines of diffusers with random weights, in the layouts of published ones, for pictures of 16 pixels."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import LDMPipeline  # pyright: ignore[reportPrivateImportUsage]
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE, SIDE, LENGTH = 16, 8, 12
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VQ: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CLASSES = ["cat, a tabby", "dog", *(f"class {n}" for n in range(2, 1000))]


def vae() -> AutoencoderKL:
    """f 2, with the scaling factor of Stable Diffusion, which is far from what these weights need."""
    blocks: Any = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        **blocks,
        block_out_channels=(8, 16),  # type: ignore[arg-type]
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.18215,
        sample_size=SIZE,
    )


def clip_tokenizer(padding: str) -> CLIPTokenizer:
    """CLIP's tokenizer, with a token per letter; `!` is number 0, as in CLIP's own vocabulary."""
    letters = ["!", *"abcdefghijklmnopqrstuvwxyz0123456789?"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    merges: Any = [("r", "e"), ("re", "d</w>")]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=padding)
    tokenizer.model_max_length = LENGTH
    return tokenizer


def stable_diffusion(folder: Path, second: bool = False, **options: Any) -> Path:
    """Write a pipeline in the layout of Stable Diffusion 1.5, or of 2.1.

    2.1 predicts v, pads with `!`, has OpenCLIP's activation in its text encoder, whose last layer is left out of the
    folder, heads by level, and linear projections in the UNet.
    """
    torch.manual_seed(0)
    tokenizer = clip_tokenizer("!" if second else "<|endoftext|>")
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        vocab_size=len(tokenizer),
        hidden_act="gelu" if second else "quick_gelu",
        projection_dim=16,
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if second else 4,  # type: ignore[arg-type]
        use_linear_projection=second,
    )
    more = {"prediction_type": "v_prediction"} if second else {}
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SCALED, skip_prk_steps=True, steps_offset=1, **more),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, **options)
    return folder


def dit(folder: Path) -> Path:
    """Write a pipeline in the layout of DiT's: it predicts a variance, too, and names its 1,000 classes."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_eps=1e-5,
    )
    for weight in transformer.parameters():
        nn.init.normal_(weight, std=0.1)
    first, *others = [block.norm1.emb for block in transformer.transformer_blocks]  # type: ignore[union-attr]
    for other in others:
        other.load_state_dict(first.state_dict())  # type: ignore[operator]
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    DiTPipeline(transformer, vae(), scheduler).save_pretrained(folder)  # type: ignore[arg-type]
    index = folder / "model_index.json"
    labels = {str(n): name for n, name in enumerate(CLASSES)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}))
    return folder


def latent_diffusion(folder: Path, scaling_factor: float) -> Path:
    """Write a pipeline in the layout of latent diffusion's unconditional models: VQ-f2, and a UNet with attention."""
    torch.manual_seed(0)
    blocks: Any = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vqvae = VQModel(
        **blocks,
        **VQ,
        latent_channels=3,
        num_vq_embeddings=16,
        vq_embed_dim=3,
        scaling_factor=scaling_factor,
    )
    nn.init.normal_(vqvae.quantize.embedding.weight)
    unet = UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    LDMPipeline(vqvae, unet, scheduler).save_pretrained(folder)
    return folder
