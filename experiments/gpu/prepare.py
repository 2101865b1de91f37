"""Write what a run reads, with random content: prepare.py data OVERRIDES, then prepare.py parts OVERRIDES.

data: records.json and pictures/, of which `mmlab shards build llava_json` makes shards. Conversations are longer than
`data.max_length`, so rows are filled nearly to it. parts: folders of the language model and the vision encoder, where
the recipe looks for them, with the tokenizer in tokenizer/.
"""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mmlab.config.compose import compose

SHARD = 2 * 2**30  # bytes per file


def write_data(cfg: DictConfig) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(1500)]

    def turn(speaker: str, length: int) -> dict[str, str]:
        return {"from": speaker, "value": " ".join(draw.choices(words, k=length))}

    Path("pictures").mkdir(exist_ok=True)
    records: list[dict[str, Any]] = []
    for i in range(cfg.data.global_batch * cfg.trainer.max_steps):
        name = f"{i:06}.jpg"
        pixels = torch.randint(256, (12, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).resize((640, 480)).save(Path("pictures", name))
        turns = [turn(*of) for _ in range(cfg.data.max_length // 24) for of in (("human", 10), ("gpt", 14))]
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        records.append({"id": name, "image": name, "conversations": turns})
    Path("records.json").write_text(json.dumps(records))


def write_part(folder: Path, kind: Any, architecture: dict[str, Any]) -> None:
    """Write a transformers folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(**architecture, torch_dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = kind.from_config(config).state_dict()
    # The same noise from another place for each weight: drawing 7 billion numbers would take a minute.
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    places: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, file))
        held.clear()

    for i, (name, weight) in enumerate(weights.items()):
        if weight.ndim < 2:
            held[name] = torch.full_like(weight, float(not name.endswith("bias")), dtype=torch.bfloat16, device="cpu")
        else:
            repeated = noise.roll(i * 9973).repeat(-(-weight.numel() // len(noise)))
            held[name] = repeated[: weight.numel()].view(weight.shape).clone()
        if sum(one.nbytes for one in held.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_parts(cfg: DictConfig) -> None:
    for part, kind in (("language", AutoModelForCausalLM), ("vision", AutoModel)):
        settings: Any = OmegaConf.to_container(cfg.model[part])
        write_part(Path(settings["source"]), kind, settings["architecture"])
    shutil.copytree("tokenizer", cfg.model.language.source, dirs_exist_ok=True)
    statistics = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    Path(cfg.model.vision.source, "preprocessor_config.json").write_text(json.dumps(statistics))


if __name__ == "__main__":
    {"data": write_data, "parts": write_parts}[sys.argv[1]](compose("train", sys.argv[2:]))
