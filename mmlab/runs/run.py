"""A run's folder: its config, its overrides and the state of the code."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import mmlab
from mmlab.config.build import check_target_names
from mmlab.config.errors import ConfigError, nearest
from mmlab.config.explain import explain_key
from mmlab.config.fields import check_fields
from mmlab.config.schemas import attach, schemas, targets
from mmlab.runs.disk import claim, write_text
from mmlab.runs.naming import is_execution, stage_of
from mmlab.runs.redact import redact, redact_text

DONE = "done.json"
LOCK = ".lock"
_LOCKS: list[TextIO] = []  # kept open until the process ends: closing a file releases its lock
PACKAGES = (
    "mmlab",
    "torch",
    "lightning",
    "transformers",
    "hydra-core",
    "omegaconf",
    "webdataset",
    "numpy",
    "wandb",
)
# A run may be resumed with other values of these.
MAY_CHANGE = ("run", "trainer", "logger", "callbacks", "data.root")


def prepare_run(cfg: DictConfig) -> Path:
    """Create the run's folder and write `config.yaml` (resolved), `overrides.txt` and `code.json` into it.

    Secrets are redacted. Only rank 0 writes; it locks the folder until the process ends. With `run.fresh` an existing
    folder of that name is renamed first.

    Returns:
        The folder, `cfg.run.dir`.

    Raises:
        ConfigError: the folder belongs to a run with another config.
        RunError: another process is training the run.
    """
    folder = Path(cfg.run.dir)
    config: Any = redact(OmegaConf.to_container(cfg, resolve=True))
    exists = (folder / "config.yaml").is_file()
    if exists:
        _lock(folder)
    if cfg.run.fresh:
        # A requeued job repeats its command line, and must resume the run that it started.
        if _rank() == 0 and int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
            _rename_old(folder)
    elif exists:
        previous: Any = OmegaConf.to_container(load_run_config(folder), resolve=True)
        _check_same_run(folder, previous, config, stage_of(cfg))
        end = ("max_steps", "max_epochs")
        if _rank() == 0 and any(previous["trainer"][key] != config["trainer"][key] for key in end):
            (folder / DONE).unlink(missing_ok=True)
    if _rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    overrides: Any = []
    if HydraConfig.initialized():
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    write_text(folder / "overrides.txt", "".join(f"{redact_text(override)}\n" for override in overrides))
    write_text(folder / "code.json", json.dumps(redact(code_state()), indent=1) + "\n")
    return folder


def _rename_old(folder: Path) -> None:
    """Rename an existing run's folder to the first free `<folder>.1`, `.2`, …."""
    if not (folder / "config.yaml").exists():
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(old)


def _lock(folder: Path) -> None:
    """Keep other processes from training the run until this one ends; the ranks after the first need no lock."""
    if _rank() == 0:
        _LOCKS.append(claim(folder / LOCK, "is training"))


def finish(folder: Path, metrics: dict[str, Any]) -> None:
    """Mark a run as complete, with its last metrics; called after everything else is written."""
    write_text(folder / DONE, json.dumps(redact(metrics), indent=1) + "\n")


def finished(folder: Path) -> bool:
    """Whether the run in this folder is complete."""
    return (folder / DONE).is_file()


def find_run(name: str, root: str | Path) -> Path:
    """Return the folder of a run.

    Args:
        name: the folder itself, the run's name in `root`, or its recipe (`llava/align_tiny`).
        root: the folder of all runs.

    Raises:
        ConfigError: no such run.
    """
    for folder in (Path(name), Path(root, name), Path(root, name.replace("/", "-"))):
        if (folder / "config.yaml").is_file():
            return folder
    names = [path.parent.name for path in Path(root).glob("*/config.yaml")]
    listed = f" Runs there: {', '.join(sorted(names)[:8])}." if names else ""
    raise ConfigError(f"There is no run '{name}' in {root}.{nearest(name.replace('/', '-'), names)}{listed}")


def load_run_config(folder: str | Path) -> DictConfig:
    """Read a run's `config.yaml` back into its dataclasses. Nothing in it is imported, built or interpolated.

    Raises:
        ConfigError: no such file, no plain YAML, unknown keys, or a `_target_` that is not allowed.
    """
    path = Path(folder, "config.yaml")
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no run in {folder}: it has no config.yaml.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not plain YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a mapping.")
    for where, value in _leaves(plain, ""):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(f"{path}: '{where}' contains an interpolation; a run's config must be resolved.")
    for where, value in _leaves(plain, ""):
        if where.endswith("_target_") and str(value).startswith("mmlab.") and value not in targets():
            raise ConfigError(f"{path} is from another version of mmlab: {value} does not exist; train the run again.")
    check_target_names(plain)
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(schemas()["TrainConfig"]), plain)
        assert isinstance(cfg, DictConfig)
        attach(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {explain_key(error)}") from error
    check_fields(cfg)
    return cfg


def code_state() -> dict[str, Any]:
    """Return the commit, the uncommitted diff, the names of untracked files and the versions of packages."""
    state: dict[str, Any] = {"versions": {"python": platform.python_version()}}
    for package in PACKAGES:
        try:
            state["versions"][package] = version(package)
        except PackageNotFoundError:
            state["versions"][package] = None
    state["commit"] = _git("rev-parse", "HEAD")
    state["diff"] = _git("diff", "HEAD", "--", ".") if state["commit"] else None
    new = _git("ls-files", "--others", "--exclude-standard")
    state["new_files"] = new.splitlines() if new else []
    return state


def _git(*command: str) -> str | None:
    """The output of a git command in mmlab's own repository; None if there is none or git fails."""
    assert mmlab.__file__ is not None
    root = Path(mmlab.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _check_same_run(folder: Path, previous: Any, config: Any, stage: type | None) -> None:
    """Refuse a config that describes another run than the one in the folder."""
    old, new = dict(_leaves(previous, "")), dict(_leaves(config, ""))
    for key in sorted(old.keys() | new.keys()):
        free = is_execution(key, stage) or any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} contains a run with {key}={old.get(key)}, not {new.get(key)}; "
                "give another run.name, or remove the folder."
            )


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf."""
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    else:
        yield where, node


def _rank() -> int:
    return max(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
