"""Runs for the demo: two that answer, and one that draws."""

import shutil
from pathlib import Path

import pytest
import torch

from mmlab.stage.assembly import restore
from mmlab.training.artifacts import save_parts
from tests.demo.tiny_demo import MARKUP
from tests.evaluate.tiny_scores import diffusion_run, first_stage_run, make_run

SMALL = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, image_size: 16}"


@pytest.fixture(scope="session")
def chats(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder of runs whose answers differ and are long: `before` and `after`."""
    runs = tmp_path_factory.mktemp("chats")
    vision = ["model/vision=clip_tiny", f"model.vision.architecture={SMALL}", "data=shapes", "stage=finetune"]
    language = ["model/language=llama_tiny", f"model.language.tokenizer={tokenizer_folder}"]
    parts = ["vision", "connector", "language"]
    twice(make_run(runs, "before", ["model=llava", *vision, *language], parts), "after", parts)
    return runs


@pytest.fixture(scope="session")
def draws(tmp_path_factory) -> Path:
    """A folder of a run that draws, `class`, and its first stage; a class has a name like markup."""
    runs = tmp_path_factory.mktemp("draws")
    first_stage_run(runs)
    conditioner = f"model.conditioner={{classes: [circle, '{MARKUP}', star], width: 8}}"
    diffusion_run(runs, "class", ["model/conditioner=class", conditioner])
    return runs


@torch.no_grad()
def twice(folder: Path, other: str, parts: list[str]) -> None:
    """Copy a run, and change the language model of both: an untrained one says the same whatever it is asked."""
    model, _ = restore(folder)
    shutil.copytree(folder, folder.with_name(other))
    for seed, name in enumerate((folder.name, other)):
        torch.manual_seed(seed)
        for weight in model.language.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
        save_parts(model, parts, folder.with_name(name) / "artifacts", {"run": name}, {})
