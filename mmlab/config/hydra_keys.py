"""What a config may set under `hydra`, checked before Hydra acts on any of it.

Hydra builds callbacks, launchers, sweepers and log handlers from this node, sets environment variables from it and
imports packages to look for configs. People exchange recipes and data pages, so none of them may name an object or a
variable there: what is not in the lists below must have the value of Hydra's own pages or of ours.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mmlab.config.errors import ConfigError, nearest
from mmlab.config.folders import conf_dir

_PLUGINS = "hydra_plugins.hydra_"
_TARGETS = {
    "sweeper": (
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        f"{_PLUGINS}optuna_sweeper.optuna_sweeper.OptunaSweeper",
    ),
    "launcher": (
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        f"{_PLUGINS}joblib_launcher.joblib_launcher.JoblibLauncher",
        f"{_PLUGINS}submitit_launcher.submitit_launcher.LocalLauncher",
        f"{_PLUGINS}submitit_launcher.submitit_launcher.SlurmLauncher",
    ),
    "sweeper.sampler": tuple(
        f"optuna.samplers.{name}Sampler"
        for name in ("TPE", "Random", "CmaEs", "NSGAII", "NSGAIII", "MOTPE", "Grid", "QMC", "GP", "BruteForce")
    ),
}
# Keys whose values are texts, numbers and lists of them, or that Hydra writes itself.
_FREE = re.compile(
    r"(mode|verbose|(run|sweep)\.dir|sweep\.subdir|runtime|help|hydra_help"
    r"|job\.(name|num|id|chdir|config|config_name|override_dirname)"
    r"|searchpath"  # checked before it is used, by `check_search_path`
    r"|sweeper\.(max_batch_size|params|direction|storage|study_name|n_trials|n_jobs|max_failure_rate|search_space"
    r"|custom_search_space|sampler\._partial_|sampler\.[a-z]\w*)"
    # of joblib, and of submitit
    r"|launcher\.(n_jobs|backend|prefer|require|verbose|timeout|pre_dispatch|batch_size|temp_folder|max_nbytes|mmap_mode"
    r"|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb|nodes|name|stderr_to_stdout|partition|qos|comment"
    r"|constraint|exclude|gres|cpus_per_gpu|gpus_per_task|mem_per_gpu|mem_per_cpu|account|signal_delay_s"
    r"|max_num_timeout|array_parallelism))(\.[^_.][^.]*)*"
)
# The shell commands of a job, its environment, and the folder of its pickles.
_COMMAND_LINE = ("launcher.setup", "launcher.additional_parameters", "launcher.submitit_folder")
_LOGGING = ("job_logging", "hydra_logging")


def check_hydra(cfg: DictConfig, overrides: Sequence[str], packages: Sequence[str] = ()) -> None:
    """Check the `hydra` node of a composed config.

    Args:
        cfg: the config, with its node `hydra`.
        overrides: of the command line.
        packages: prefixes of the packages that the user allows, as in MMLAB_ALLOW_TARGETS.

    Raises:
        ConfigError: naming the first key that is not allowed, or its value.
    """
    node: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    for kind in ("hydra", "task"):
        if not set(node["overrides"][kind]) <= set(overrides):
            raise ConfigError("'hydra.overrides' cannot be set: Hydra records the command line there.")
    del node["overrides"]
    for kind in _LOGGING:
        if node.pop(kind, None) not in _pages(kind):
            options = ", ".join(sorted(path.stem for path in _page_files(kind)))
            raise ConfigError(
                f"'hydra.{kind}' has settings of its own, which could run code; use hydra/{kind}=<option> ({options}), "
                "and hydra.verbose=true for more output."
            )
    # Hydra's own copy of the config would contain secrets; the run's folder has a redacted one.
    if node.pop("output_subdir", None) not in (None, ".hydra"):
        raise ConfigError("'hydra.output_subdir' cannot be set: the run's folder contains config.yaml already.")
    with open_dict(cfg):
        cfg.hydra.output_subdir = None
    own, given = dict(_leaves(_defaults())), [override.lstrip("+~").partition("=")[0] for override in overrides]
    for key, value in _leaves(node):
        if value is None or value in ({}, []) or (key in own and own[key] == value):
            continue
        if _below(key, _COMMAND_LINE) and (value in _of_our_pages() or _below(f"hydra.{key}", given)):
            continue
        _check_leaf(cfg, key, value, packages)


def check_search_path(folders: Any) -> None:
    """Check `hydra.searchpath`; reading configs of a package would import it.

    Raises:
        ConfigError: an entry that is no folder.
    """
    for folder in folders if isinstance(folders, Sequence) and not isinstance(folders, str) else ():
        if "://" in str(folder) and not str(folder).startswith("file://"):
            raise ConfigError(f"'hydra.searchpath' takes folders, not '{folder}', which would be imported.")


def _check_leaf(cfg: DictConfig, key: str, value: Any, packages: Sequence[str]) -> None:
    """Check a value that is not Hydra's own default."""
    where, _, last = key.rpartition(".")
    if last == "_target_" and where in _TARGETS:
        if value not in _TARGETS[where] and not str(value).startswith(tuple(packages) or ("\0",)):
            raise ConfigError(
                f"'hydra.{key}' '{value}' is not allowed.{nearest(str(value), _TARGETS[where])} "
                f"Choose it with hydra/{where.replace('.', '/')}=…"
            )
        return
    if _below(key, _COMMAND_LINE):
        raise ConfigError(
            f"'hydra.{key}' is only allowed on the command line: a job's commands and environment could run anything."
        )
    if not _FREE.fullmatch(key):
        raise ConfigError(
            f"'hydra.{key}' is not allowed: under 'hydra', a config may set only folders and names of runs, verbosity, "
            "and the settings of sweeps and jobs."
        )
    try:
        value = OmegaConf.select(cfg, f"hydra.{key}", throw_on_missing=False)
    except OmegaConfBaseException:
        return  # it names something without a value, and is reported by whoever needs it
    if key == "sweeper.custom_search_space" and value and not str(value).startswith(tuple(packages) or ("\0",)):
        raise ConfigError(f"'hydra.{key}' '{value}' is not allowed; allow its package with MMLAB_ALLOW_TARGETS=….")
    if OmegaConf.is_config(value) and len(value):
        raise ConfigError(f"'hydra.{key}' must be a plain value, not a reference to a section.")
    if _below(key, ("launcher",)) and isinstance(value, str) and not value.isprintable():
        raise ConfigError(f"'hydra.{key}' contains a line break or control character.")


def _below(key: str, keys: Sequence[str]) -> bool:
    """Whether `key` is one of `keys` or lies within one."""
    return any(key == each or key.startswith(f"{each}.") for each in keys)


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf, empty sections included."""
    if isinstance(node, Mapping | list) and node:
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif where:
        yield where, node


@cache
def _defaults() -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(OmegaConf.structured(HydraConf()), resolve=False)
    del plain["defaults"]
    return plain


@cache
def _of_our_pages() -> list[Any]:
    """The values of the keys in `_COMMAND_LINE` that our launchers and those of the plugins have."""
    ours = [dict(_leaves(_read(path))) for path in (conf_dir() / "hydra" / "launcher").glob("*.yaml")]
    values = [value for page in ours for key, value in page.items() if _below(f"launcher.{key}", _COMMAND_LINE)]
    return [*values, "${hydra.sweep.dir}/.submitit/%j", None, {}, []]


def _page_files(kind: str) -> list[Path]:
    folders = [Path(hydra.__file__).parent / "conf", conf_dir()]
    return [path for folder in folders for path in (folder / "hydra" / kind).glob("*.yaml")]


@cache
def _pages(kind: str) -> list[Any]:
    return [_read(path) for path in _page_files(kind)]


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))
