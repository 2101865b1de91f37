"""From a config to a stage and its data."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build
from mmlab.config.fieldcheck import schema_fields
from mmlab.config.run import find_run
from mmlab.data.conversation import Prompt
from mmlab.data.module import ShardDataModule
from mmlab.model.activation_checkpointing import checkpoint_activations


def build_stage(cfg: DictConfig) -> Any:
    """Build model, optimiser and the stage around them.

    Raises:
        ConfigError: parts that cannot be built or loaded, or that do not fit.
    """
    given: dict[str, Any] = {}
    if "prompt" in cfg.stage:
        given["prompt"] = Prompt(**OmegaConf.to_container(cfg.stage.prompt, resolve=True))  # type: ignore[arg-type]
    for name in ("process", "sampler"):
        if cfg.get(name) is not None:
            given[name] = build(cfg[name])
    runs = [str(find_run(run, cfg.run.root)) for run in cfg.stage.init_from]
    model = build(cfg.model)
    if cfg.trainer.gradient_checkpointing:
        checkpoint_activations(model)
    return build(cfg.stage, model=model, optim=build(cfg.optim), init_from=runs, **given)


def build_data(cfg: DictConfig, stage: Any) -> ShardDataModule:
    """Build the data module with the stage's collate.

    Raises:
        ConfigError, DataError: sources that cannot be opened, or settings that the stage's batches do not have.
    """
    # The settings that shape a batch: the stage that receives it interprets them.
    shape = [name for name, field in schema_fields(cfg.data).items() if field.metadata.get("verb") and name != "root"]
    options = {name: cfg.data[name] for name in shape}
    node = {key: value for key, value in cfg.data.items() if key not in (*shape, "root")}
    node["train"], node["val"] = sources(cfg, "train"), sources(cfg, "val")
    return build(node, collate=stage.collate(**options))


def sources(cfg: DictConfig, split: str) -> list[dict[str, Any]]:
    """The sources of a split, their paths resolved against `data.root`."""
    found = [dict(source) for source in cfg.data[split]]
    return [{**source, "path": str(Path(cfg.data.root) / source["path"])} for source in found]
