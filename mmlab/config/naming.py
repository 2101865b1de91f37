"""The name of a run: fixed when the config is composed, so that the same command twice is one run."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig, OmegaConf, open_dict

# What says how or where a run is executed, and not what it computes: another device count is the same run.
EXECUTION = (
    "run",
    "hydra",
    "logger",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.profile",
    "data.workers",
    "data.micro_batch",
)


def is_execution(key: str) -> bool:
    """Whether the dotted `key` (or group) leaves what is computed as it is."""
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in EXECUTION)


def run_name(choices: Mapping[str, str | None], overrides: Sequence[str]) -> str | None:
    """Name a run after its recipe, or after its model and stage, and hash what else was overridden.

    Args:
        choices: config group → option (Hydra's `runtime.choices`).
        overrides: the command line's `key=value`; a later one of the same key wins.

    Returns:
        The name, or None as long as neither a recipe nor a model and a stage are chosen.
    """
    recipe = choices.get("experiment")
    named = {"experiment"} if recipe else {"model", "stage"}
    parts = [recipe] if recipe else [choices.get("model"), choices.get("stage")]
    if any(part in (None, "???") for part in parts):
        return None
    changed = {}
    for override in overrides:
        key, _, value = override.partition("=")
        bare = key.lstrip("+")
        if bare not in named | {"trainer"} and not is_execution(bare):
            changed[bare] = value
    digest = hashlib.sha256(json.dumps(sorted(changed.items())).encode()).hexdigest()[:8]
    return "-".join(map(str, parts)).replace("/", "-") + (f"-{digest}" if changed else "")


def settle(cfg: DictConfig) -> None:
    """Write down, in place, the values that depend on the command line or the environment.

    `run.name` becomes `run_name(…)` unless it was given; wandb's `offline` says whether the key is absent.
    """
    with open_dict(cfg):
        if OmegaConf.select(cfg, "run.dir", throw_on_resolution_failure=False) and cfg.run.name is None:
            choices = OmegaConf.to_container(cfg.hydra.runtime.choices, resolve=False)
            overrides = OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)
            cfg.run.name = run_name(choices, overrides)  # type: ignore[arg-type]
        logger = OmegaConf.select(cfg, "logger")
        if isinstance(logger, DictConfig) and "offline" in logger and logger.offline is None:
            logger.offline = "WANDB_API_KEY" not in os.environ
