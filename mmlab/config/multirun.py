"""What `-m` asks for: the points of a grid, and each point's config."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.build import VARIABLE, allowed_prefixes
from mmlab.config.errors import ConfigError, RunError, UserError

# Hydra instantiates its sweeper and launcher itself; what they may be is decided here.
PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.", "optuna.storages.")
SWEEPING = ("hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher", "hydra.mode")


def canonical(override: str) -> str:
    """Write an override as the points of a sweep have it: `optim.lr=1e-3` and `optim.lr=0.001` are one run."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except OverrideParseException:
        return override
    if "=" not in override or parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={parsed.get_value_element_as_str()}"


def is_sweep(override: str) -> bool:
    """Whether an override has several values, or an interval of them."""
    return OverridesParser.create().parse_override(override).is_sweep_override()


@dataclass
class Multirun:
    """A command line with `-m`.

    Args:
        loader: composes the points.
        cfg: what the points have in common, with Hydra's own node.
        flags: `--config-dir …` and the like, which a point needs on a command line of its own.
    """

    loader: ConfigLoader
    cfg: DictConfig
    flags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what Hydra would otherwise instantiate unseen."""
        hydra: Any = OmegaConf.to_container(self.cfg.hydra, resolve=False)
        for kind in ("sweeper", "launcher"):
            _check_plugins(hydra[kind], f"hydra.{kind}")

    def plugin(self, kind: str) -> str:
        """Return the class that `hydra/<kind>=…` names, such as BasicSweeper or JoblibLauncher."""
        # Hydra loads the plugins' modules under names of its own: their classes cannot be compared.
        return str(self.cfg.hydra[kind]._target_).rpartition(".")[2]

    @property
    def overrides(self) -> list[str]:
        """The command line's overrides, Hydra's left out."""
        return self._given("task")

    @property
    def params(self) -> list[str]:
        """The overrides that a config file gives as `hydra.sweeper.params`."""
        sweeper: Any = OmegaConf.to_container(self.cfg.hydra.sweeper, resolve=False)
        return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]

    @property
    def swept(self) -> list[str]:
        """The overrides with several values, or an interval of them."""
        return [override for override in [*self.params, *self.overrides] if is_sweep(override)]

    @property
    def plugin_free(self) -> list[str]:
        """Hydra's own overrides, without those that say how a sweep is run."""
        return [override for override in self._given("hydra") if not override.lstrip("+~").startswith(SWEEPING)]

    def _given(self, kind: str) -> list[str]:
        # Not resolved: `run.name=${seed}` means the seed of each point.
        given: Any = OmegaConf.to_container(self.cfg.hydra.overrides[kind], resolve=False)
        return given

    def grid(self) -> list[list[list[str]]]:
        """Return batches (one, unless `hydra.sweeper.max_batch_size` is set) of the points' overrides.

        Raises:
            ConfigError: a grid cannot hold what was given, such as an interval.
        """
        given = [*self.params, *self.overrides]
        try:
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(given)
            return BasicSweeper.split_arguments(parsed, self.cfg.hydra.sweeper.get("max_batch_size"))
        except HydraException as error:
            wrong = next((override for override in given if "interval(" in override), None)
            if wrong is None:
                raise ConfigError(f"{str(error).splitlines()[0].rstrip('.')}.") from error
            raise ConfigError(f"'{wrong}' has no end of values; search it with hydra/sweeper=optuna.") from error

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return the config of one point, with Hydra's own node.

        Raises:
            ConfigError: it cannot be composed; the sentence names the point.
        """
        try:
            return self.loader.load_sweep_config(self.cfg, list(overrides))
        except ConfigError as error:
            raise ConfigError(f"In the point {' '.join(self.own(overrides))}: {error}") from error

    def own(self, overrides: Sequence[str]) -> list[str]:
        """Return those of a point's overrides that not all points have."""
        common = {canonical(override) for override in [*self.params, *self.overrides]}
        return [override for override in map(canonical, overrides) if override not in common]


def run_in_turn(multirun: Multirun, task: Callable[[DictConfig], Any]) -> None:
    """Call `task` with the config of each point of a grid, in this process; all are composed before.

    Raises:
        ConfigError: a point's config is wrong, or another sweeper or launcher is asked for.
        RunError: points failed; the others were run.
    """
    for kind in ("sweeper", "launcher"):
        if multirun.plugin(kind) != f"Basic{kind.capitalize()}":
            raise ConfigError(f"This verb runs its points one after the other, without hydra/{kind}=…")
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


def _check_plugins(node: Any, where: str) -> None:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_" and not str(value).startswith((*PLUGINS, *allowed_prefixes())):
                raise ConfigError(
                    f"'{where}._target_' '{value}' is not allowed: it names a plugin of Hydra or a sampler of Optuna; "
                    f"vouch for a package of your own with {VARIABLE}=<package>."
                )
            if key == "custom_search_space" and value and not str(value).startswith(allowed_prefixes()):
                raise ConfigError(f"'{where}.{key}' '{value}' is not allowed; vouch for its package with {VARIABLE}=….")
            _check_plugins(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check_plugins(value, f"{where}.{i}")
