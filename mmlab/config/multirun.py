"""A command line with `-m`: the points of its grid and the config of each."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.errors import ConfigError, RunError, UserError

# Hydra's own keys that concern the sweep and not its points.
SWEEP_KEYS = ("hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher", "hydra.mode")


def canonical(override: str) -> str:
    """Normalize an override to the form used in the points of a sweep: `optim.lr=1e-3` becomes `optim.lr=0.001`."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except OverrideParseException:
        return override
    if "=" not in override or parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={parsed.get_value_element_as_str()}"


def is_sweep(override: str) -> bool:
    """Whether an override has several values or an interval."""
    return OverridesParser.create().parse_override(override).is_sweep_override()


@dataclass
class Multirun:
    """A command line with `-m`.

    Args:
        loader: composes the points.
        cfg: the config that the points have in common, including Hydra's own node.
        flags: `--config-dir …` and the like, for the command line of a point.
    """

    loader: ConfigLoader
    cfg: DictConfig
    flags: list[str] = field(default_factory=list)

    def plugin(self, kind: str) -> str:
        """Return the class name of `hydra/<kind>=…`, such as BasicSweeper or JoblibLauncher."""
        # Hydra imports the plugins' modules under other names, so the classes themselves cannot be compared.
        return str(self.cfg.hydra[kind]._target_).rpartition(".")[2]

    @property
    def overrides(self) -> list[str]:
        """The overrides on the command line, except Hydra's own."""
        return self._overrides("task")

    @property
    def params(self) -> list[str]:
        """The overrides in a config file's `hydra.sweeper.params`."""
        sweeper: Any = OmegaConf.to_container(self.cfg.hydra.sweeper, resolve=False)
        return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]

    @property
    def swept(self) -> list[str]:
        """The overrides with several values or an interval."""
        return [override for override in [*self.params, *self.overrides] if is_sweep(override)]

    @property
    def plugin_free(self) -> list[str]:
        """Hydra's own overrides, except those about sweeps."""
        return [override for override in self._overrides("hydra") if not override.lstrip("+~").startswith(SWEEP_KEYS)]

    def _overrides(self, kind: str) -> list[str]:
        # Not resolved: `run.name=${seed}` refers to the seed of each point.
        overrides: Any = OmegaConf.to_container(self.cfg.hydra.overrides[kind], resolve=False)
        return overrides

    def grid(self) -> list[list[list[str]]]:
        """Return the points' overrides in batches: one batch, unless `hydra.sweeper.max_batch_size` is set.

        Raises:
            ConfigError: an override that is not possible in a grid, such as an interval.
        """
        overrides = [*self.params, *self.overrides]
        try:
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(overrides)
            return BasicSweeper.split_arguments(parsed, self.cfg.hydra.sweeper.get("max_batch_size"))
        except HydraException as error:
            interval = next((override for override in overrides if "interval(" in override), None)
            if interval is None:
                raise ConfigError(f"{str(error).splitlines()[0].rstrip('.')}.") from error
            raise ConfigError(f"'{interval}' is not a list of values; search it with hydra/sweeper=optuna.") from error

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return the config of one point, including Hydra's own node.

        Raises:
            ConfigError: it cannot be composed; the message names the point.
        """
        try:
            return self.loader.load_sweep_config(self.cfg, list(overrides))
        except ConfigError as error:
            raise ConfigError(f"At sweep point {' '.join(self.own(overrides))}: {error}") from error

    def own(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides of a point that it does not share with all others."""
        common = {canonical(override) for override in [*self.params, *self.overrides]}
        return [override for override in map(canonical, overrides) if override not in common]


def run_in_turn(multirun: Multirun, task: Callable[[DictConfig], Any]) -> None:
    """Compose all points of a grid, then call `task` with the config of each, in this process.

    Raises:
        ConfigError: a point's config is invalid, or another sweeper or launcher is chosen.
        RunError: some points failed; the others were run.
    """
    for kind in ("sweeper", "launcher"):
        if multirun.plugin(kind) != f"Basic{kind.capitalize()}":
            raise ConfigError(f"Only `mmlab train` supports hydra/{kind}=…; leave it out.")
    configs = [multirun.compose(point) for batch in multirun.grid() for point in batch]
    failures = 0
    for cfg in configs:
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        try:
            task(cfg)
        except UserError as error:
            failures += 1
            print(f"mmlab: {' '.join(str(error).split())}", file=sys.stderr)
    if failures:
        raise RunError(f"{failures} of {len(configs)} points failed.")
