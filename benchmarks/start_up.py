"""Contest: from the start of a process to the end of its first training step.

The work is small: a LLaVA of 2M weights, a batch of 32 pictures, two data workers. `mmlab train` composes a config,
checks shards and builds the parts; the peers are short scripts that train a `LlavaForConditionalGeneration` of that
size, on samples that they draw. Nearly all of the time are imports, so a first round reads the files into memory.

    python benchmarks/start_up.py [ROUNDS]
"""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contest import Contest, Outcome, main

BATCH, WORKERS, IMAGE_TOKEN, PLACES, LENGTH = 32, 2, 512, 64, 96
EYE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def prepare(folder: Path) -> None:
    from mmlab.data.shard_files import write_shards
    from mmlab.data.sources.shapes import shapes
    from mmlab.data.tokenizer import train_tokenizer

    for split in ("train", "val"):
        index, _ = write_shards(shapes(64), folder / "data" / split, total=64, quiet=True)
    train_tokenizer([index], folder / "data" / "tokenizer", quiet=True)


def end() -> None:
    """End the process after its first step; workers and unfinished work are left to the system."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    print("\n" + json.dumps(asdict(Outcome(1, seconds))), flush=True)
    os._exit(0)


def of_mmlab(folder: Path) -> Outcome:
    from mmlab.cli import main as mmlab

    os.environ["MMLAB_ALLOW_TARGETS"] = "first_step"
    settings = {
        "data.root": folder / "data",
        "data.workers": WORKERS,
        "run.root": folder / "runs",
        "run.fresh": "true",
        "stage.init_from": "[]",
        "model.language.tokenizer": folder / "data" / "tokenizer",
        "+callbacks.end._target_": "first_step.End",
    }
    code = mmlab(["train", "experiment=llava/align_tiny", *(f"{key}={value}" for key, value in settings.items())])
    raise RuntimeError(f"mmlab train ended with exit code {code} before its first step.")


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {**EYE, "model_type": "clip_vision_model", "image_size": 64, "patch_size": 8}
    text = {**EYE, "model_type": "llama", "vocab_size": IMAGE_TOKEN + 1}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def samples() -> Any:
    import torch
    from torch.utils.data import Dataset

    class Drawn(Dataset):
        def __len__(self) -> int:
            return 10 * BATCH

        def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
            text = torch.randint(IMAGE_TOKEN, (LENGTH - PLACES,), generator=torch.Generator().manual_seed(i))
            ids = torch.cat([torch.full((PLACES,), IMAGE_TOKEN), text])
            return {
                "input_ids": ids,
                "labels": ids.where(ids != IMAGE_TOKEN, -100),
                "pixel_values": torch.rand(3, 64, 64),
            }

    return Drawn()


def of_lightning(_: Path) -> Outcome:
    import lightning
    import torch
    from first_step import End
    from torch.utils.data import DataLoader

    class Stage(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llava()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([weight for weight in self.parameters() if weight.requires_grad], lr=1e-3)

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=[End()]
    )
    trainer.fit(Stage(), DataLoader(samples(), BATCH, shuffle=True, num_workers=WORKERS))
    raise RuntimeError("The training ended before its first step.")


def of_transformers(folder: Path) -> Outcome:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class End(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            end()

    arguments = TrainingArguments(
        str(folder / "trainer"), per_device_train_batch_size=BATCH, max_steps=1, learning_rate=1e-3,
        dataloader_num_workers=WORKERS, report_to=[], use_cpu=True,
    )  # fmt: skip
    Trainer(llava(), arguments, train_dataset=samples(), callbacks=[End()]).train()
    raise RuntimeError("The training ended before its first step.")


CONTEST = Contest(
    "start-up",
    "starts",
    {"transformers' Trainer": of_transformers, "Lightning": of_lightning, "mmlab train": of_mmlab},
    prepare,
)

if __name__ == "__main__":
    main(CONTEST)
