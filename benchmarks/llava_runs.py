"""Two whole LLaVA trainings with the same samples, weights and steps: transformers' Trainer and `mmlab train`.

The language model has the shape of SmolLM2-135M (576 wide, 30 layers, 49,152 tokens), the vision encoder that of a
ViT-S/16 at 128 px (64 tokens of a picture). Their weights are random and lie in folders that both sides load. The
samples are JPEG files of 256 px: a list of them for transformers, shards for mmlab.
"""

import io
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Outcome, tiny
from lightning.pytorch.callbacks import Callback
from PIL import Image

LANGUAGE: dict[str, Any] = {"vocab_size": 49152, "max_position_embeddings": 2048, "hidden_size": 576}
LANGUAGE |= {"intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
VISION: dict[str, Any] = {"image_size": 128, "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536}
VISION |= {"num_hidden_layers": 12, "num_attention_heads": 6}
if tiny():
    LANGUAGE |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3}
    LANGUAGE |= {"vocab_size": 2048}
    VISION |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORKERS = 1
os.environ["MMLAB_ALLOW_TARGETS"] = "llava_runs"  # of the clock
WORDS, SYLLABLES = 800, ("ba", "de", "ki", "lo", "mu", "na", "po", "ri", "sa", "te", "vo", "zu")
LR, CLIP, SEED = 1e-3, 1.0, 0


@dataclass
class Training:
    """A stage of LLaVA.

    Attributes:
        stage: its option in `conf/stage`.
        samples: of a step.
        steps: of the run, of which the first `warm` are not measured.
        template: `plain` or `v1`.
        trains_language: or the connector alone.
    """

    stage: str
    samples: int
    steps: int
    warm: int
    template: str
    trains_language: bool


def words(rng: random.Random, count: int) -> str:
    """So many words of a vocabulary of 800."""
    numbers = (rng.randrange(WORDS) for _ in range(count))
    return " ".join(SYLLABLES[n % 12] + SYLLABLES[n // 12 % 12] + SYLLABLES[n // 144] for n in numbers)


def picture(rng: random.Random) -> bytes:
    """A JPEG of 256 px with smooth colors and some noise."""
    noise = np.random.default_rng(rng.randrange(1 << 30))
    colors = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(colors.resize((256, 256), Image.Resampling.BICUBIC)).astype(int)
    pixels = smooth + noise.integers(-12, 12, (256, 256, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare(folder: Path, training: Training, records: list[dict[str, Any]]) -> None:
    """Write what both sides read: samples, tokenizer, weights, and mmlab's order of samples and first connector."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from mmlab.data.shard_files import write_shards
    from mmlab.data.tally import Tally
    from mmlab.data.tokenizer import train_tokenizer

    rng = random.Random(1)
    (folder / "pictures").mkdir()

    def samples() -> Any:
        for number, record in enumerate(records):
            name = f"sample-{number:05d}"
            jpeg = picture(rng)
            (folder / "pictures" / f"{name}.jpg").write_bytes(jpeg)
            yield name, {"jpg": jpeg, "json": record}
        return Tally()

    index, _ = write_shards(samples(), folder / "shards", 256, quiet=True)
    tokenizer = train_tokenizer([index], folder / "language", 2000, quiet=True)
    torch.manual_seed(SEED)
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    LlamaForCausalLM(LlamaConfig(**LANGUAGE, **special, tie_word_embeddings=True)).save_pretrained(folder / "language")
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "vision")
    _image_processor().save_pretrained(folder / "vision")
    _record_start(folder, training, records)


def _record_start(folder: Path, training: Training, records: list[dict[str, Any]]) -> None:
    import lightning

    from mmlab.config.compose import compose
    from mmlab.data.reader import GlobalBatches, LocalBatches
    from mmlab.stage.assembly import build_data, build_stage

    cfg = compose("train", overrides(folder, training))
    lightning.seed_everything(cfg.seed, verbose=False)
    stage = build_stage(cfg)
    torch.save(stage.model.connector.state_dict(), folder / "connector.pt")
    data = build_data(cfg, stage)
    cut = GlobalBatches(training.samples, training.samples)
    batches = LocalBatches(data.train_sources, stage.collate(data.config), cut, data.config)
    keys = [key for step in range(training.steps) for key in batches[step]["keys"]]
    rows = [{"picture": f"{key}.jpg", **records[int(key.split("-")[1])]} for key in keys]
    (folder / "samples.json").write_text(json.dumps(rows))


def overrides(folder: Path, training: Training) -> list[str]:
    """The command line of `mmlab train`."""
    system = [] if training.template == "plain" else ["stage.prompt.system=''"]
    return [
        "model=llava",
        "model/vision=pretrained",
        f"model.vision.source={folder}/vision",
        "model/language=pretrained",
        f"model.language.source={folder}/language",
        f"stage={training.stage}",
        f"stage.prompt.template={training.template}",
        *system,
        "data=lcs_558k",
        f"data.root={folder}",
        "data.train=[{path: shards}]",
        f"data.global_batch={training.samples}",
        f"data.micro_batch={training.samples}",
        f"data.workers={WORKERS}",
        "data.aspect=stretch",
        "data.pack=true",
        "trainer=cpu",
        "trainer.precision=32-true",
        f"trainer.max_steps={training.steps}",
        f"trainer.gradient_clip_val={CLIP}",
        "trainer.log_every_n_steps=1",
        f"optim={{lr: {LR}, schedule: constant, warmup_ratio: 0}}",
        "callbacks.picture_use=null",  # transformers does not measure it
        "+callbacks.clock._target_=llava_runs.Clock",
        f"run.root={folder}/runs",
        "run.name=contest",
        "run.fresh=true",
    ]


class Clock(Callback):
    """The time at the end of each step."""

    ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def outcome(training: Training, ends: list[float], losses: list[float]) -> Outcome:
    """What a side reports."""
    return Outcome((training.steps - training.warm) * training.samples, ends[-1] - ends[training.warm - 1], losses)


def train_ours(folder: Path, training: Training) -> Outcome:
    """`mmlab train`, with packed rows."""
    from mmlab.cli import main
    from mmlab.runs.metrics_table import read_table

    Clock.ends.clear()
    if code := main(["train", *overrides(folder, training)]):
        raise RuntimeError(f"mmlab train ended with {code}.")
    rows = read_table(folder / "runs/contest/metrics.csv")
    return outcome(training, Clock.ends, [float(row["train/loss"]) for row in rows.values()])


def _image_processor() -> Any:
    from transformers import CLIPImageProcessorPil

    size = VISION["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


class Samples(torch.utils.data.Dataset):
    """The rows of `samples.json`, one for each picture, or for each of its questions."""

    def __init__(self, folder: Path, training: Training):
        self.folder = folder
        self.rows: list[tuple[str, str, str]] = []
        for row in json.loads((folder / "samples.json").read_text()):
            if training.template == "plain":
                self.rows.append((row["picture"], "<image>", row["caption"] + "\n"))
                continue
            for item in row["questions"]:
                question = f"USER: <image>\n{item['question']} ASSISTANT:"
                self.rows.append((row["picture"], question, f" {item['answer']}</s>"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> dict[str, Any]:
        name, prompt, answer = self.rows[n]
        with Image.open(self.folder / "pictures" / name) as file:
            return {"image": file.convert("RGB"), "prompt": prompt, "answer": answer}


class Collator:
    """Pads a batch as the examples of transformers and trl do; the loss is on the answers."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [row["prompt"] + row["answer"] for row in rows]
        images = [row["image"] for row in rows]
        batch = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[batch["attention_mask"] == 0] = -100
        tokenizer = self.processor.tokenizer
        pictures = (batch["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
        for row, (prompt, places) in enumerate(zip(prompts, pictures, strict=True)):
            labels[row, : len(prompt) - 1 + places] = -100
        return {**batch, "labels": labels}


def train_theirs(folder: Path, training: Training) -> Outcome:
    """transformers' Trainer, with the model, the processor and the padding that its users have."""
    from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    tokenizer = AutoTokenizer.from_pretrained(folder / "language", padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = _peer(folder, tokenizer.convert_tokens_to_ids("<image>"))
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    if training.trains_language:
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    data = Samples(folder, training)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder / "peer"),
            per_device_train_batch_size=len(data) // training.steps,
            max_steps=training.steps,
            learning_rate=LR,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_num_workers=WORKERS,
            disable_tqdm=True,
            use_cpu=True,
            seed=SEED,
        ),
        train_dataset=data,
        data_collator=Collator(_processor(tokenizer)),
        callbacks=[Ends()],
    )
    trainer.train()
    trainer.save_model()
    return outcome(training, ends, [log["loss"] for log in trainer.state.log_history if "loss" in log])


def _processor(tokenizer: Any) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        _image_processor(),
        tokenizer,
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _peer(folder: Path, image_token: int) -> Any:
    from transformers import AutoConfig, CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(folder / "vision"),
        text_config=AutoConfig.from_pretrained(folder / "language"),
        image_token_index=image_token,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = CLIPVisionModel.from_pretrained(folder / "vision")
    language = LlamaForCausalLM.from_pretrained(folder / "language")
    model.model.language_model, model.lm_head = language.model, language.lm_head
    connector = torch.load(folder / "connector.pt")
    for layer, number in (("linear_1", 0), ("linear_2", 2)):
        weights = {name: connector[f"layers.{number}.{name}"] for name in ("weight", "bias")}
        getattr(model.model.multi_modal_projector, layer).load_state_dict(weights)
    return model
