"""A run's folder: what was configured, what was overridden, and which code ran it."""

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
from mmlab.config.schemas import attach, schemas
from mmlab.runs.disk import claim
from mmlab.runs.naming import is_execution, stage_of
from mmlab.runs.redact import redact, redact_text

DONE = "done.json"
LOCK = ".lock"
_CLAIMS: list[TextIO] = []  # open as long as the process lives: closing a file gives its lock back
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
# A run may go on with other values of these; everything else is what the run is.
MAY_CHANGE = ("run", "trainer", "logger", "callbacks", "data.root")


def prepare_run(cfg: DictConfig) -> Path:
    """Make the run's folder and write `config.yaml` (resolved), `overrides.txt` and `code.json` into it.

    Secrets are redacted. Only the first process of a run writes, and as long as it lives no other command can
    train that run. With `run.fresh` an earlier folder of that name is set aside.

    Returns:
        The folder, `cfg.run.dir`.

    Raises:
        ConfigError: the folder holds a run that was configured differently.
        RunError: another process is training it.
    """
    folder = Path(cfg.run.dir)
    config: Any = redact(OmegaConf.to_container(cfg, resolve=True))
    if (folder / "config.yaml").is_file():
        _claim(folder)
    if cfg.run.fresh:
        # A requeued job is the same start of the run, not another one.
        if _rank() == 0 and int(os.environ.get("SLURM_RESTART_COUNT") or 0) == 0:
            _set_aside(folder)
    elif (folder / "config.yaml").is_file():
        # Keys that came after the run was made have their defaults.
        before: Any = OmegaConf.to_container(load_run_config(folder), resolve=True)
        _refuse_other(folder, before, config, stage_of(cfg))
        _reopen(folder, before, config)
    if _rank() > 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    overrides: Any = []
    if HydraConfig.initialized():
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    _write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    _write(folder / "overrides.txt", "".join(f"{redact_text(override)}\n" for override in overrides))
    _write(folder / "code.json", json.dumps(redact(code_state()), indent=1) + "\n")
    return folder


def _reopen(folder: Path, before: dict[str, Any], config: dict[str, Any]) -> None:
    """A complete run whose end was moved is not complete any more."""
    if _rank() == 0 and any(before["trainer"][key] != config["trainer"][key] for key in ("max_steps", "max_epochs")):
        (folder / DONE).unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    """Rename a run's folder to the first free `<folder>.1`, `.2`, …; an empty or missing one stays."""
    if not (folder / "config.yaml").exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)


def _claim(folder: Path) -> None:
    """Make this process the only one that trains the run: the system's lock ends with it, in whatever way."""
    if _rank() > 0:
        return
    taken = "{} is being trained by {}; wait for it, or stop it."
    name = f"process {os.getpid()} on {platform.node()}"
    _CLAIMS.append(claim(folder / LOCK, name, lambda who: taken.format(folder, who)))


def finish(folder: Path, metrics: dict[str, Any]) -> None:
    """Mark a run as complete, with its last metrics, after everything else is written."""
    _write(folder / DONE, json.dumps(redact(metrics), indent=1) + "\n")


def finished(folder: Path) -> bool:
    """Whether the run in this folder has completed."""
    return (folder / DONE).is_file()


def find_run(name: str, root: str | Path = "runs") -> Path:
    """Return the folder of a run, given its folder, its name, or its recipe (`llava/align_tiny`).

    Raises:
        ConfigError: there is no such run.
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
        ConfigError: no such file, not plain YAML, unknown keys, or a `_target_` that is not allowed.
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
    for where, value in _texts(plain, ""):
        if "${" in value:
            raise ConfigError(f"{path}: '{where}' holds an interpolation, which a run's config never does.")
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
    """Return the commit, the uncommitted diff, new files' names and the versions behind a run."""
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
    """Ask git about the folder that mmlab was imported from; None outside of a repository."""
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


def _refuse_other(folder: Path, before: Any, config: Any, stage: type | None) -> None:
    """Compare with the config that the folder was made for: never two runs in one folder."""
    old, new = dict(_leaves(before, "")), dict(_leaves(config, ""))
    for key in sorted(old.keys() | new.keys()):
        free = is_execution(key, stage) or any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
        if not free and old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key}={old.get(key)}, not {new.get(key)}; "
                "give another run.name, or remove that folder."
            )


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    else:
        yield where, node


def _texts(node: Any, where: str) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in _leaves(node, where) if isinstance(value, str))


def _write(path: Path, text: str) -> None:
    """Write beside the destination and rename: a killed process leaves no half file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _rank() -> int:
    return max(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
