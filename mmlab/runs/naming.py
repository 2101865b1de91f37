"""The name of a run: fixed when the config is composed, so that the same command twice is one run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mmlab.config.multirun import canonical, is_sweep

# What says how or where a run is executed, and not what it computes: another device count is the same run.
EXECUTION = (
    "run",
    "hydra",
    "sweep",
    "sampler",
    "logger",
    "callbacks.checkpoint",
    "callbacks.samples",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.profile",
    "trainer.gradient_checkpointing",
    "data.workers",
    "data.micro_batch",
)


def is_execution(key: str, stage: type | None = None) -> bool:
    """Whether the dotted `key` (or group) leaves what is computed as it is.

    Args:
        key: as in `data.workers`.
        stage: the dataclass of the run's stage, as `stage_of` finds it.
    """
    if key == "data.micro_batch" and getattr(stage, "compares_samples", False):
        return False
    key = key.replace("/", ".")
    return any(key == name or key.startswith(f"{name}.") for name in EXECUTION)


def stage_of(cfg: DictConfig) -> type | None:
    """Return the dataclass of the stage that `cfg` chooses, where it has chosen one."""
    return OmegaConf.get_type(OmegaConf.select(cfg, "stage", throw_on_missing=False))


def run_name(choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None = None) -> str | None:
    """Name a run after its recipe, or after its model and stage; add swapped options, and hash other overrides.

    Args:
        choices: config group → option (Hydra's `runtime.choices`).
        overrides: the command line's `key=value`; a later one of the same key wins.
        stage: the dataclass of the stage.

    Returns:
        The name, such as `llava-align_tiny-clip_tiny-1f2e3d4c`, or None as long as neither a recipe nor a
        model and a stage are chosen.
    """
    recipe = choices.get("experiment")
    parts = [recipe] if recipe else [choices.get("model"), choices.get("stage")]
    if any(part in (None, "???") for part in parts):
        return None
    swapped, changed = _changes(choices, overrides, stage)
    digest = hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest()[:8]
    words = [*parts, *swapped, *([digest] if changed else [])]
    return "-".join(map(str, words)).replace("/", "-")


def sweep_name(choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None = None) -> str:
    """Name a sweep after its recipe (or its model and stage) and a hash of what it sweeps and overrides.

    Args:
        choices: config group → option, where one is chosen for all points.
        overrides: the command line's `key=value`, sweeps such as `optim.lr=1e-3,1e-4` among them.
        stage: the dataclass of the stage, where it is one for all points.
    """
    recipe = choices.get("experiment")
    parts = [recipe] if recipe else [choices.get("model"), choices.get("stage")]
    words = [str(part) for part in parts if part not in (None, "???")]
    # An execution key counts where it is swept, and the metric decides what a search tries.
    what = {
        override.partition("=")[0].lstrip("+"): canonical(override)
        for override in overrides
        if is_sweep(override)
        or override.startswith("sweep.")
        or not is_execution(override.partition("=")[0].lstrip("+"), stage)
    }
    digest = hashlib.sha256(json.dumps(sorted(what.items())).encode()).hexdigest()[:8]
    return "-".join([*words, "sweep", digest]).replace("/", "-")


def predecessor(name: str, swapped: Sequence[str], root: Path) -> str:
    """The run that `stage.init_from` means by a recipe's name: that recipe with the same parts swapped in.

    Of `swapped` a recipe can have only what it has groups for, so the run with most of them is taken. Where
    there is none, `name` is returned as it is.
    """
    bare = name.replace("/", "-")
    for count in range(len(swapped), 0, -1):
        for some in combinations(swapped, count):
            if (root / "-".join([bare, *some]) / "config.yaml").is_file():
                return "-".join([bare, *some])
    return name


def _changes(
    choices: Mapping[str, str | None], overrides: Sequence[str], stage: type | None
) -> tuple[list[str], dict[str, str]]:
    """(options of groups swapped in, other overridden keys and their values); what only executes is left out."""
    named = {"experiment"} if choices.get("experiment") else {"model", "stage"}
    swapped: dict[str, str] = {}
    changed: dict[str, str] = {}
    for override in overrides:
        key, _, value = canonical(override).partition("=")
        bare = key.lstrip("+")
        if bare in named | {"trainer"} or is_execution(bare, stage):
            continue
        (swapped if bare in choices and value.replace("_", "").isalnum() else changed)[bare] = value
    return [swapped[group] for group in sorted(swapped)], changed


def settle_run(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> None:
    """Write down, in place, the values that depend on the command line.

    `run.name` becomes `run_name(…)` unless it was given; `stage.init_from` names the runs that it means unless it was
    given.

    Args:
        cfg: composed `TrainConfig`.
        choices: config group → option (Hydra's `runtime.choices`).
        overrides: the command line's `key=value`.
    """
    if cfg.run.name is None:
        cfg.run.name = run_name(choices, overrides, stage_of(cfg))
    given = any(override.lstrip("+").startswith("stage.init_from") for override in overrides)
    if not given and OmegaConf.select(cfg, "stage.init_from", throw_on_missing=False):
        swapped, _ = _changes(choices, overrides, stage_of(cfg))
        cfg.stage.init_from = [predecessor(run, swapped, Path(cfg.run.root)) for run in cfg.stage.init_from]
