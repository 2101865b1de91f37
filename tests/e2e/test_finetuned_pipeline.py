"""A pipeline of diffusers is finetuned by the recipes, with an adapter or whole, and goes back to diffusers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mmlab import cli
from mmlab.stage.assembly import restore
from tests.model.tiny_pipelines import LENGTH, SIDE
from tests.tiny_commands import carry_out
from tests.tiny_shapes import make_shapes

SMALL = f"data.size=16 data.workers=0 data.global_batch=2 data.micro_batch=2 model.conditioner.max_length={LENGTH}"
SMALL += " trainer=cpu trainer.devices=1 logger=none callbacks.samples=null data.root=shapes optim.lr=0.1"
PROMPTS = ["a red circle", "blue?"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, stable_diffusion) -> Path:
    """A run with adapters on the UNet and the text encoder, of other ranks, exported apart and merged."""
    folder = tmp_path_factory.mktemp("work")
    make_shapes(folder / "shapes", train=8, val=2, size=16)
    tiny = f"{SMALL} model.denoiser.source={stable_diffusion} trainer.max_epochs=null trainer.max_steps=2"
    text = "+stage.lora.conditioner.rank=2 +stage.lora.conditioner.alpha=6 stage.trainable=[denoiser,conditioner]"
    return carry_out(
        folder,
        [
            f"train experiment=ldm/sd15_lora {tiny} stage.lora.denoiser.alpha=8 {text} run.name=lora",
            "export run=lora steps=4 out=merged",
            "export run=lora steps=4 merge=false out=apart",
        ],
    )


def pictures(folder: Path, adapter: Path | None = None) -> Tensor:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    noise = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    return pipeline(PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=7.5, output_type="pt").images


def test_diffusers_loads_the_adapter(work):
    merged, base = pictures(work / "merged"), pictures(work / "apart")
    assert merged.std() > 0.01 and (merged - base).abs().max() > 0.05
    torch.testing.assert_close(pictures(work / "apart", work / "apart" / "adapter"), merged, rtol=0, atol=1e-4)
    names = {name.split(".")[0] for name in load_file(work / "apart/adapter/pytorch_lora_weights.safetensors")}
    assert names == {"unet", "text_encoder"}
    with safe_open(work / "apart/adapter/pytorch_lora_weights.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lora_adapter_metadata"])
    assert all("attn" in layer for layer in about["unet.target_modules"]), "whole names"


def test_the_adapter_belongs_to_the_published_pipeline(work, stable_diffusion):
    pipeline: Any = StableDiffusionPipeline.from_pretrained(stable_diffusion, local_files_only=True)
    pipeline.load_lora_weights(work / "apart" / "adapter")
    ours = restore(work / "runs" / "lora")[0]
    x, time = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), torch.tensor([10, 700])
    with torch.no_grad():
        condition = ours.conditioner(ours.conditioner.tokenize(PROMPTS))
        ids = ours.conditioner.tokenize(PROMPTS)["input_ids"]
        context = pipeline.text_encoder(ids)[0]
        torch.testing.assert_close(context, condition["context"], rtol=0, atol=1e-4)
        theirs = pipeline.unet(x, time, encoder_hidden_states=context).sample
        torch.testing.assert_close(theirs, ours(x, time, condition), rtol=0, atol=1e-4)


def test_the_artifact_names_the_pipeline(work, stable_diffusion):
    card = json.loads((work / "runs/lora/artifacts/denoiser/card.json").read_text())
    assert card["base"]["source"] == str(stable_diffusion)


def test_another_process_is_refused(work, stable_diffusion, monkeypatch, capsys):
    monkeypatch.chdir(work)
    command = f"train experiment=ldm/sd15_finetune {SMALL} model.denoiser.source={stable_diffusion} run.name=no"
    assert cli.main([*command.split(), "process.target=v"]) == 2
    assert "was trained with target=epsilon, as its scheduler says" in capsys.readouterr().err
