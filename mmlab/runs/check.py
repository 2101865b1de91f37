"""Checks of a training config before any model is built."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.build import build, check_targets
from mmlab.config.errors import ConfigError, nearest
from mmlab.config.schemas import schema_of
from mmlab.runs.index_files import has_index
from mmlab.runs.ranks import FSDP, accumulation, check_tasks, world_size
from mmlab.runs.redact import hide_known
from mmlab.runs.run import find_run
from mmlab.runs.shard_patterns import lacks_index, named_shards, set_name

SAMPLER_OPTIONS = {"noise": "ddim", "codes": "codes"}
"""`draws_from` of a stage → an option of conf/sampler that fits it."""

PIPELINE_PARTS = ("unet", "transformer", "denoiser", "vae", "vqvae", "text_encoder")
"""Folders of models in pipelines of diffusers."""
SHARDED_PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")


def check(cfg: DictConfig) -> None:
    """Check everything that a composed `TrainConfig` refers to: parts, files, batches, classes.

    Raises:
        ConfigError: the first error found, with a remedy.
    """
    check_names(cfg.run)
    check_settings(cfg.stage)
    check_trainable(cfg)
    check_bitsandbytes(cfg.model)
    check_quantized(cfg)
    check_rates(cfg.optim)
    check_process(cfg)
    check_length(cfg)
    check_batches(cfg)
    check_data_kind(cfg)
    check_sources(cfg.data, world_size(cfg.trainer))
    check_local_files(cfg.model)
    check_callbacks(cfg)
    for run in OmegaConf.select(cfg, "stage.init_from") or []:
        find_run(run, cfg.run.root)
    check_targets(cfg)
    check_sampling(cfg)
    check_strategy(cfg.trainer)


def check_names(run: DictConfig) -> None:
    """Check that no name or folder of the run contains a secret; they are shown everywhere."""
    for key in ("name", "root", "dir", "sweep"):
        if run[key] and hide_known(run[key]) != run[key]:
            raise ConfigError(f"run.{key} contains a secret, such as the value of a variable; give another name.")


def check_settings(stage: DictConfig) -> None:
    """Check that the page of a user's own stage takes the settings of a stage of ours."""
    if OmegaConf.get_type(stage) is dict:
        raise ConfigError(
            f"The stage {stage.get('_target_')} has no settings: its page must begin with those of its base, as in "
            "`defaults: [/schema/ContrastivePretrainingConfig@_here_, _self_]`."
        )


def check_trainable(cfg: DictConfig) -> None:
    """Check that `stage.trainable`, `optim.part_lr` and `stage.lora` begin with names of the model's parts."""
    parts = getattr(OmegaConf.get_type(cfg.model), "parts", None)
    if parts is None:  # a user's own model: checked when it is built
        return
    parts = [part for part in parts if part not in cfg.model or cfg.model[part] is not None]
    named = {
        "stage.trainable": list(cfg.stage.trainable),
        "optim.part_lr": list(cfg.optim.get("part_lr") or {}),
        "stage.lora": list(cfg.stage.get("lora") or {}),
    }
    if not named["stage.trainable"]:
        raise ConfigError(f"stage.trainable is empty; name the parts to train: {', '.join(parts)}.")
    for key, names in named.items():
        for name in names:
            if name.split(".")[0] not in parts:
                hint = nearest(name, parts)
                raise ConfigError(f"{key}: the model has no part '{name}'.{hint} Parts: {', '.join(parts)}.")


def check_bitsandbytes(model: DictConfig) -> None:
    """Check that this machine can have the model's 4-bit weights; `mmlab plan` does not need it."""
    for key in _quantized(model).values():
        if find_spec("bitsandbytes") is None:
            raise ConfigError(f"{key} needs bitsandbytes: pip install 'mmlab[qlora]'")


def _quantized(model: DictConfig) -> dict[str, str]:
    """Parts with 4-bit weights, and the settings that ask for them."""
    nodes = {str(part): node.get("quantize") for part, node in model.items() if isinstance(node, DictConfig)}
    return {part: f"model.{part}.quantize={kind}" for part, kind in nodes.items() if kind is not None}


def check_quantized(cfg: DictConfig) -> None:
    """Check that parts with 4-bit weights are not trained, apart from an adapter, nor sharded."""
    for part, key in _quantized(cfg.model).items():
        if part not in (cfg.stage.get("lora") or {}) and part in {name.split(".")[0] for name in cfg.stage.trainable}:
            raise ConfigError(
                f"{key}: 4-bit weights cannot be trained; add an adapter with +stage.lora.{part}.rank=64, or leave "
                f"{part} out of stage.trainable."
            )
        if cfg.trainer.strategy == FSDP:
            raise ConfigError(f"{key}: 4-bit weights cannot be sharded; use trainer=ddp, or leave out {key}.")
        if cfg.trainer.precision == "64-true":
            raise ConfigError(f"{key} computes in at most 32 bits; leave out trainer.precision=64-true.")


def check_rates(optim: DictConfig) -> None:
    """Check that the learning rates are positive, and that the schedule does not rise to `optim.min_lr`."""
    last = optim.get("min_lr") or 0.0
    parts = optim.get("part_lr") or {}
    peaks = {"optim.lr": optim.get("lr"), **{f"optim.part_lr.{part}": rate for part, rate in parts.items()}}
    for name, peak in peaks.items():
        if peak is not None and peak <= 0:
            raise ConfigError(f"{name}={peak:g} must be above 0; to freeze a part, leave it out of stage.trainable.")
        if peak is not None and last > peak and optim.get("schedule") != "constant":
            raise ConfigError(
                f"optim.min_lr={last:g} is above {name}={peak:g}, so the learning rate would rise; lower optim.min_lr."
            )


def check_callbacks(cfg: DictConfig) -> None:
    """Check that each callback is a mapping or null."""
    for name, node in cfg.callbacks.items():
        if node is not None and (not isinstance(node, DictConfig) or node.get("_target_") is None):
            raise ConfigError(f"callbacks.{name}={node}: give a mapping with a _target_, or null to disable it.")


def check_process(cfg: DictConfig) -> None:
    """Check that a diffusion stage has a noise process and no other stage has one, and that the sampler fits."""
    kind = OmegaConf.get_type(cfg.stage)
    if kind is dict:  # a user's own stage: checked by its constructor
        return
    source = getattr(kind, "draws_from", None)
    if source == "noise" and cfg.process is None:
        raise ConfigError("No process is chosen; give a noise process such as process=cosine_v.")
    if source != "noise" and cfg.process is not None:
        raise ConfigError(f"{cfg.stage._target_} takes no noise process; leave out process.")
    if cfg.sampler is None:
        return
    if source is None:
        raise ConfigError(f"{cfg.stage._target_} generates no images; leave out sampler.")
    if getattr(OmegaConf.get_type(cfg.sampler), "draws_from", source) != source:
        what = f"{cfg.stage._target_} samples from {source}, but this sampler does not"
        raise ConfigError(f"{what}; try sampler={SAMPLER_OPTIONS[source]}.")


def check_sampling(cfg: DictConfig) -> None:
    """Check that the samplers of a run, of its sample sheets and its scores can draw from what it trains.

    Called after the targets are checked, because process and sampler are built.

    Raises:
        ConfigError: a sampler that does not fit the noise process or the latents, or guidance without a condition.
    """
    source = getattr(OmegaConf.get_type(cfg.stage), "draws_from", None)
    model: Any = cfg.model
    guidance = OmegaConf.select(cfg, "sampler.guidance" if source == "codes" else "sampler.guidance.scale")
    if str(OmegaConf.select(model, "conditioner._target_")).endswith(".NoCondition") and guidance not in (None, 1):
        key = "sampler.guidance" if source == "codes" else "sampler.guidance.scale"
        raise ConfigError(f"{key}={guidance:g} has no effect on an unconditional model; leave it out.")
    if source != "noise" or cfg.process is None:
        return
    chosen, default = cfg.sampler, schema_of("mmlab.diffusion.samplers.Sampler")
    assert default is not None
    sampler: Any = build(OmegaConf.structured(default) if chosen is None else chosen)
    if not hasattr(sampler, "check"):  # a user's own
        return
    process, first_stage = build(cfg.process), str(OmegaConf.select(model, "first_stage._target_"))
    where = "sampler" if chosen is not None else "sampler, DDIM by default"
    uses = [(where, None)]
    uses += [
        (f"callbacks.{name}", node.steps)
        for name, node in cfg.callbacks.items()
        if node is not None and str(node._target_).endswith(".GeneratedSamples")
    ]
    for where, steps in uses:
        try:
            sampler.check(process, steps, latents=not first_stage.endswith(".Identity"))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def check_length(cfg: DictConfig) -> None:
    """Check that the run has an end."""
    if cfg.trainer.max_steps is None and cfg.trainer.max_epochs is None:
        raise ConfigError("The run has no end; give trainer.max_steps=… or trainer.max_epochs=…")
    data: Any = OmegaConf.to_object(cfg.data)
    if cfg.trainer.max_epochs is not None and not isinstance(data, dict):
        data.check_epochs()


def check_batches(cfg: DictConfig) -> None:
    """Check that SLURM started one task per device, and that the devices divide the global batch."""
    ranks, nodes = world_size(cfg.trainer), cfg.trainer.num_nodes
    check_tasks(ranks // nodes, nodes)
    accumulation(cfg.data.global_batch, cfg.data.micro_batch, ranks)


def check_strategy(trainer: DictConfig) -> None:
    """Check that there is a strategy of that name, which trains in the precision.

    Called last, when the targets have already imported Lightning.
    """
    from lightning.pytorch.strategies import StrategyRegistry

    if trainer.strategy.lower() == FSDP != trainer.strategy:
        raise ConfigError(f"'trainer.strategy' cannot be '{trainer.strategy}'. Did you mean '{FSDP}'?")
    if trainer.strategy == FSDP and trainer.precision not in SHARDED_PRECISIONS:
        raise ConfigError(
            f"trainer.strategy={FSDP} does not train with trainer.precision={trainer.precision}; use one of "
            f"{', '.join(SHARDED_PRECISIONS)}."
        )
    # Others save checkpoints of their own, or cannot start our processes.
    ddp = [name for name in StrategyRegistry.available_strategies() if name.startswith("ddp") and "spawn" not in name]
    names = ["auto", *ddp, FSDP]
    if trainer.strategy.lower() not in names:
        plain = [name for name in names if "_" not in name]
        hint = nearest(trainer.strategy, names) or f" Options: {', '.join(plain)}, …."
        raise ConfigError(f"'trainer.strategy' cannot be '{trainer.strategy}'.{hint}")


def check_data_kind(cfg: DictConfig) -> None:
    """Check that the data are of the kind that the stage reads."""
    reads: Any = getattr(OmegaConf.get_type(cfg.stage), "reads", None)
    kind: Any = OmegaConf.get_type(cfg.data)
    if reads is not None and kind is not dict and not issubclass(kind, reads):
        raise ConfigError(
            f"{cfg.stage._target_} reads {reads.__name__}, and data is {kind.__name__}; choose another data=…"
        )


def check_sources(data: DictConfig, world: int = 1) -> None:
    """Check that every source of the data is a folder of indexed shards, or an address, for so many ranks."""
    config: Any = OmegaConf.to_object(data)
    if isinstance(config, dict):  # a user's own data: checked by its constructor
        return
    config.check_mixture()
    made_by = "shards encode RUN SRC OUT" if getattr(config, "latents", False) else "shards build"
    for split in ("train", "val"):
        for i, source in enumerate(getattr(config, split)):
            if config.streamed and (split == "train" or lacks_index(source.path, config.root)):
                try:
                    shards = named_shards(source.path, config.root)
                    if split == "train":
                        config.check_lanes(source.name or set_name(shards), len(shards), world)
                except ConfigError as error:
                    raise ConfigError(f"'data.{split}.{i}.path': {error}") from None
                continue
            folder = config.folder(source)
            if isinstance(folder, Path):  # addresses are opened next, see `check_addresses`
                check_shards(folder, f"data.{split}.{i}.path", made_by)


def check_shards(folder: Path, where: str, made_by: str) -> None:
    """Check that `folder` contains indexed shards.

    Args:
        folder: the folder of a source.
        where: the source's key, for the error.
        made_by: the command that writes such shards, for the error.

    Raises:
        ConfigError: no folder, no shards, or shards without an index.
    """
    if has_index(folder):
        return
    if folder.is_file():
        raise ConfigError(f"'{where}': {folder} is a file; give the folder of the shards.")
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, siblings)
        raise ConfigError(f"'{where}': there is no folder {folder}.{hint} `mmlab {made_by}` creates shards.")
    if any(folder.glob("*.tar")):
        raise ConfigError(
            f"'{where}': the shards in {folder} have no index; run `mmlab shards index {folder}`, or train without one "
            "with data/loader=stream."
        )
    raise ConfigError(f"'{where}': there are no shards in {folder}; `mmlab {made_by}` creates them.")


def check_local_files(model: DictConfig) -> None:
    """Check that every `source` and `tokenizer` that looks like a path exists."""
    for where, value in _texts(OmegaConf.to_container(model, resolve=True), "model"):
        name = where.rpartition(".")[2]
        if name == "source" and Path(value, "adapter_config.json").is_file():
            raise ConfigError(
                f"'{where}': {value} is an adapter, not a whole model; set the model that it belongs to, and name the "
                "adapter's run in stage.init_from."
            )
        if name not in ("source", "tokenizer") or not looks_local(value) or Path(value).expanduser().exists():
            continue
        what = "tokenizer" if name == "tokenizer" else "model"
        hint = " `mmlab shards tokenizer` creates one." if name == "tokenizer" else ""
        raise ConfigError(f"'{where}': there is no {what} folder {value}.{hint}")


def looks_local(name: str) -> bool:
    """Whether `name` looks like a path rather than a name on the Hugging Face Hub (`owner/model`, or of a part of a
    pipeline there, `owner/model/unet`)."""
    parts = Path(name).parts
    if len(parts) == 3 and parts[2] in PIPELINE_PARTS:
        parts = parts[:2]
    return name.startswith((".", "/", "~")) or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir())


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and value of every string below `node`, except in `architecture`."""
    for key, value in node.items():
        if isinstance(value, dict) and key != "architecture":
            yield from _texts(value, f"{where}.{key}")
        elif isinstance(value, str):
            yield f"{where}.{key}", value
