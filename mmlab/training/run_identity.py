"""The identity of a run in its checkpoints: stored in each, compared when one is resumed from."""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mmlab.config.errors import RunError
from mmlab.runs.code import commit, source_hash, versions
from mmlab.runs.disk import replacing, to_json
from mmlab.runs.identity import compare
from mmlab.runs.ranks import rank
from mmlab.runs.references import tokenizer_folder
from mmlab.runs.run import IDENTITY, Start, read_json
from mmlab.training.checkpoint_io import FolderCheckpointIO
from mmlab.training.cpu_products import products
from mmlab.training.trainable import parts_of
from mmlab.training.trainer import precision
from mmlab.weights import content_hash

PROBE = "What's in the picture?  Two red CIRCLES, 3.14159 \u00d7 \u732b \U0001f600\n\n\tUSER: def f(x): return x</s>"
"""A text with words, digits, spaces and scripts that tokenizers treat in different ways."""


class RunIdentity(Callback):
    """Stores in each checkpoint what the run depends on, and compares that record when the run resumes from one.

    Once a start trains, it is recorded in the run's folder, with copies of the model's tokenizers.

    Args:
        start: of the run.
        identity: the record, see `mmlab.runs.identity`.

    Raises:
        RunError: the checkpoint depends on something else than this start.
    """

    def __init__(self, start: Start, identity: Mapping[str, Any]):
        self.start, self.identity = start, dict(identity)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(reader := trainer.strategy.checkpoint_io, FolderCheckpointIO):
            reader.check = self._compare  # before weights are restored, which may be of another shape

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["identity"] = self.identity

    def _compare(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        for warning in compare(checkpoint.get("identity"), self.identity, str(path)):
            if rank() == 0:
                print(f"WARNING: {warning}", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = ("settings", "training")  # the run's config.yaml has them
        self.start.record({name: value for name, value in self.identity.items() if name not in own})
        if trainer.is_global_zero:
            keep_tokenizers(pl_module.model, self.start.folder)  # type: ignore[arg-type]


def identity_of(start: Start, cfg: DictConfig, stage: Any, data: Any, frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run depends on; called before a trainer casts the weights to its precision.

    Args:
        start: of the run.
        cfg: its config.
        stage: built; `sources` is the artifact that each part was filled from, `kept` names parts that are saved whole,
            `bases` is what parts with an adapter were before.
        data: the data module.
        frozen: frozen part → facts with its `content_hash`, see `describe_frozen`.
    """
    tokenizers, hardware = tokenizers_of(stage.model), cfg.trainer
    resolved = {
        "trainer.precision": precision(hardware.precision, hardware.accelerator),
        "trainer.products": products(hardware.products, hardware.accelerator),
    }
    own_template = OmegaConf.select(cfg, "stage.prompt.template") == "tokenizer"
    templates = {name: tokenizer.chat_template for name, tokenizer in tokenizers.items()}
    return {
        "run": start.run_id,
        "name": cfg.run.name,
        "cwd": os.getcwd(),
        "seed": cfg.seed,
        "frozen": {name: facts["content_hash"] for name, facts in frozen.items()}
        | {name: base["content_hash"] for name, base in stage.bases.items()}
        | _partly_frozen(stage.model, [*frozen, *stage.kept, *stage.bases]),
        "sources": {name: str(path) for name, path in stage.sources.items()},
        "tokenizers": tokenizer_hashes(stage.model),
        "template": _hash(templates) if own_template else None,
        "settings": start.settings,
        "training": {**start.training, **resolved},
        "date": OmegaConf.select(cfg, "stage.prompt.date"),
        "train": data.sources,
        "val": {source.name: source.index.hash for source in data.val_sources},
        "commit": commit(),
        "code": source_hash(),
        "versions": versions(),
    }


def tokenizers_of(model: nn.Module) -> dict[str, Any]:
    """Module in the model, such as `language` → its tokenizer; the model itself is the empty name."""
    modules = ((name, getattr(module, "tokenizer", None)) for name, module in model.named_modules())
    return {name: tokenizer for name, tokenizer in modules if hasattr(tokenizer, "save_pretrained")}


def tokenizer_hashes(model: nn.Module) -> dict[str, str]:
    """Module in the model → hash of its tokenizer, as a run records it."""
    return {name: _tokenizer_hash(tokenizer) for name, tokenizer in tokenizers_of(model).items()}


def keep_tokenizers(model: nn.Module, folder: Path) -> None:
    """Copy the model's tokenizers into a run's folder, where `mmlab.runs.references` finds them; existing ones stay."""
    for name, tokenizer in tokenizers_of(model).items():
        target = tokenizer_folder(folder, name)
        if not target.exists():
            with replacing(target) as draft:
                tokenizer.save_pretrained(draft)


def check_tokenizers(model: nn.Module, folder: Path) -> None:
    """Compare a restored model's tokenizers with those that its run was trained with.

    Raises:
        RunError: one gives other tokens; not checked if the run does not record them.
    """
    recorded = (read_json(folder / IDENTITY) or {}).get("tokenizers", {})
    for name, tokenizer in tokenizers_of(model).items():
        if recorded.get(name, now := _tokenizer_hash(tokenizer)) != now:
            raise RunError(
                f"The tokenizer of '{name or 'model'}' is not the one that {folder} was trained with: the same text "
                f"would be other tokens; restore {tokenizer_folder(folder, name)}."
            )


def _partly_frozen(model: nn.Module, others: Sequence[str]) -> dict[str, str]:
    """Part of which only some weights are trained → hash of the rest, which no checkpoint holds; without `others`."""
    hashes = {}
    for name, part in parts_of(model).items():
        fixed = {key: weight for key, weight in part.named_parameters() if not weight.requires_grad}
        if fixed and name not in others:
            holder = nn.Module()
            for key, weight in fixed.items():
                holder.register_buffer(key.replace(".", "/"), weight.detach())
            hashes[name] = content_hash(holder)
    return hashes


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash of the vocabulary, the special tokens, and the ids of a text: it survives another version of the library."""
    return _hash([sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, tokenizer(PROBE)["input_ids"]])


def _hash(value: Any) -> str:
    return hashlib.sha256(to_json(value).encode()).hexdigest()
