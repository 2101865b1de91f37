"""Tiny runs of every stage, and what is compared of them between strategies."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from mmlab.config.errors import RunError
from mmlab.data.config import ImageDataConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.data.image_condition import Conditioning
from mmlab.data.index import ShardIndex
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.language import LanguageOnly
from mmlab.stage.config import EndToEndFinetuningConfig, LanguagePretrainingConfig, StageConfig
from mmlab.stage.stage import Stage
from mmlab.training.config import EMAConfig, FSDPConfig, LoRAConfig
from mmlab.training.ema import EMA
from mmlab.training.finite import FiniteGuard
from mmlab.training.lora import add_adapters
from mmlab.training.optim import AdamW
from mmlab.training.sharding import ShardedStrategy
from mmlab.weights import is_sharded, local, whole
from tests.model import tiny
from tests.model.tiny_priors import prior_model
from tests.stage import tiny_adversarial, tiny_several
from tests.stage.test_gradients import diffusion, vision_language
from tests.stage.tiny_codes import code_data, code_stage
from tests.stage.tiny_diffusion import image_data
from tests.stage.tiny_stage import QUESTIONS, Watch, data_of, make_stage, optim
from tests.tiny_trainer import trainer_for

EPS = 1e-5
"""Of AdamW: it would turn rounding errors into steps where a gradient is 0, as that of a key's bias is."""


class Record(Watch):
    """Keeps losses, the norms before clipping, and the gradients of the first step, whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # Callbacks see gradients before a stage rescales them.
        if not self.gradients:
            self.gradients = {
                name: whole(weight.grad).detach().clone()
                for name, weight in pl_module.model.named_parameters()
                if weight.grad is not None
            }

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step > len(self.norms):
            self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


def tied(root: Path) -> Any:
    language = tiny.language(root / "tokenizer")
    language.causal.config.tie_word_embeddings = True
    language.causal.tie_weights()
    return language


def language_stage(root: Path) -> Any:
    torch.manual_seed(0)
    config = LanguagePretrainingConfig(trainable=["language"], prompt=QUESTIONS)
    return make_stage(config, LanguageOnly(tied(root)))


def adapted(root: Path) -> Any:
    model = tiny.vlm(root / "tokenizer")
    lora = {"language": LoRAConfig(rank=2, alpha=4, dropout=0.0)}
    config = EndToEndFinetuningConfig(trainable=["connector", "language"], prompt=QUESTIONS, lora=lora)
    stage = make_stage(config, model)
    torch.manual_seed(1)
    add_adapters(model, lora)
    return stage


class Part(nn.Module):
    """Fewer rows than ranks, a weight whose memory is not in order, and one that another part has, too."""

    def __init__(self, shared: nn.Parameter):
        super().__init__()
        self.row, self.shared = nn.Linear(3, 1), shared
        self.turned = nn.Parameter(torch.randn(3, 5).T)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.row(x_BC) + (x_BC @ self.turned.T).mean(1, keepdim=True) + x_BC @ self.shared


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Parameter(torch.randn(3, 1))
        self.first, self.second, self.nothing = Part(shared), Part(shared), nn.Identity()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.second(self.nothing(x_BC * self.scale)) * self.first(x_BC)


class OddStage(Stage):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(StageConfig(trainable=["first", "second"]), Odd(), optim())
        self.model.scale.requires_grad_(True)

    def collate(self, data: ImageDataConfig) -> ImageCollate:
        return ImageCollate(data, Conditioning())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = (self.model(batch["pixel_values"].float().mean((2, 3)) / 255) - 1).square().mean()
        self.log("train/loss", loss, batch_size=1)
        return loss


def odd_stage(root: Path) -> Any:
    return OddStage()


CHATS = ("align", "vision", "qformer", "qformer_align")
KINDS: dict[str, Callable[[Path], Any]] = {
    **{kind: partial(vision_language, kind) for kind in ("contrastive", "qformer_pretraining", "finetune", *CHATS)},
    "language": language_stage,
    "odd": odd_stage,
    "lora": adapted,
    "tiles": lambda root: tiny_several.tiles_stage(root / "tokenizer"),
    "dit": partial(diffusion, "dit"),
    "unet": partial(diffusion, "unet"),
    "prior": lambda root: code_stage(prior_model("map")),
    "kl": lambda root: tiny_adversarial.stage("kl", lr=2e-4, adversarial_start=3),
    "vq": lambda root: tiny_adversarial.stage("vq", lr=2e-4, codebook={"revive_after": 2}),
    "vq_ema": lambda root: tiny_adversarial.stage("vq", lr=2e-4, codebook={"ema": 0.9}),
}


@dataclass(frozen=True)
class Case:
    kind: str
    micro_batch: int = 4
    precision: str = "32-true"
    whole_below: int = 0
    hold_reduction: bool = False
    checkpoint: bool = False
    ema: bool = False
    chunked: bool = False  # sharded, the loss is computed by chunks of positions
    steps: int = 4


CASES = {
    "contrastive": Case("contrastive", micro_batch=2),
    "qformer_pretraining": Case("qformer_pretraining"),
    "align": Case("align", micro_batch=1, hold_reduction=True),
    "finetune": Case("finetune", micro_batch=1, ema=True),
    "vision": Case("vision", micro_batch=1, hold_reduction=True, steps=3),
    "qformer": Case("qformer", steps=3),
    "qformer_align": Case("qformer_align", whole_below=10**6, steps=3),
    "language": Case("language", checkpoint=True, chunked=True),
    "lora": Case("lora"),
    "tiles": Case("tiles", micro_batch=1, steps=3),
    "dit": Case("dit", ema=True),
    "unet": Case("unet", checkpoint=True, steps=3),
    "prior": Case("prior", micro_batch=2, steps=3),
    "kl": Case("kl", steps=6),
    "vq": Case("vq"),
    "vq_ema": Case("vq_ema", steps=3),  # in a fourth one, an image may be as near to one code as to another
    "odd": Case("odd"),
    "mixed": Case("finetune", precision="bf16-mixed", chunked=True),
    "mixed_vq": Case("vq", precision="bf16-mixed", steps=3),
    "half": Case("finetune", precision="bf16-true"),
    "half_lora": Case("lora", precision="bf16-true", steps=3),
}


def data_for(case: Case, stage: Any, root: Path) -> Any:
    if case.kind in ("kl", "vq", "vq_ema"):
        return tiny_adversarial.data_of(stage, root, micro_batch=case.micro_batch)
    if case.kind in ("dit", "unet", "odd"):
        return image_data(stage, ShardIndex.open(root / "maps"), micro_batch=case.micro_batch)
    if case.kind == "tiles":  # some micro-batches have no picture
        return tiny_several.data_of(stage, root / "several", micro_batch=case.micro_batch)
    if case.kind.startswith("prior"):
        return code_data(stage, ShardIndex.open(root / "maps"), micro_batch=case.micro_batch)
    return data_of(stage, [root / "train"], micro_batch=case.micro_batch)


class Poison(L.Callback):
    """Spoils one rank's share of a weight after the second step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            local(next(pl_module.model.connector.parameters())).data.fill_(torch.nan)


def poisoned(root: Path) -> str:
    """What a rank says in the end."""
    case = CASES["finetune"]
    stage = KINDS[case.kind](root)
    data = data_for(case, stage, root)
    strategy = ShardedStrategy(FSDPConfig(whole_below=0))
    trainer = trainer_for(data, 3, 2, strategy=strategy, callbacks=[Poison(), FiniteGuard()])
    with pytest.raises(RunError) as refusal:
        trainer.fit(stage, data)
    return str(refusal.value)


def run(case: Case, root: Path, strategy: str, devices: int) -> dict[str, Any]:
    """Train a case; what is compared is whole on each rank, apart from the buffers."""
    L.seed_everything(0, verbose=False)
    stage = KINDS[case.kind](root)
    stage.optim = AdamW(replace(stage.optim.config, eps=EPS))
    if case.checkpoint:
        checkpoint_activations(stage.model)
    if case.chunked and strategy == "fsdp":
        stage.model.language.settings.loss = "chunked"
    seen, ema = Record(), EMA(EMAConfig(decay=0.5)) if case.ema else None
    sharded = ShardedStrategy(FSDPConfig(case.whole_below, case.hold_reduction))
    data = data_for(case, stage, root)
    trainer = trainer_for(
        data,
        case.steps,
        devices,
        strategy=sharded if strategy == "fsdp" else strategy,
        precision=case.precision,
        callbacks=[seen, FiniteGuard(), *([ema] if ema else [])],
        gradient_clip_val=0.05,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(stage, data)
    if case.chunked and strategy == "fsdp":
        assert any("by chunks" in way for way in stage.model.language.ways)
    return {
        "losses": seen.losses,
        "norms": seen.norms,
        "gradients": seen.gradients,
        "weights": {name: whole(weight.detach()).clone() for name, weight in stage.model.named_parameters()},
        "buffers": {name: buffer.clone() for name, buffer in stage.model.named_buffers()},
        "sharded": sorted(name for name, weight in stage.model.named_parameters() if is_sharded(weight)),
    }
