"""A run's folder: its config, its overrides, the state of the code and its identity."""

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmlab.config.build import check_target_names
from mmlab.config.errors import ConfigError, RunError, nearest
from mmlab.config.explain import explain_key
from mmlab.config.fields import check_fields
from mmlab.config.locations import refuse_address
from mmlab.config.schemas import attach, schemas, targets
from mmlab.runs.code import code_state
from mmlab.runs.disk import claim, write_json, write_text
from mmlab.runs.finished_runs import DONE, FAILED, OVERRIDES, only_run_of
from mmlab.runs.identity import differing
from mmlab.runs.naming import is_execution, stage_of
from mmlab.runs.ranks import rank
from mmlab.runs.redact import redact, redact_text

IDENTITY = "identity.json"
LOCK = ".lock"
_LOCKS: list[TextIO] = []  # kept open until the process ends: closing a file releases its lock
# A run may be resumed with other values of these; some of them change how its further steps are computed.
CHANGES_STEPS = (
    "trainer.precision",
    "trainer.products",
    "trainer.gradient_clip_val",
    "trainer.deterministic",
    "trainer.overfit",
    "trainer.compile",
    "model.language.attention",
    "model.language.loss",
)
MAY_CHANGE = ("run", "trainer", "logger", "callbacks", "data.root")


@dataclass
class Start:
    """A start of a run, which leaves the folder as it is until something is trained.

    Attributes:
        folder: of the run.
        complete: the run has reached the end that its config asks for; nothing is left to train.
        run_id: of the run, the same at all of its starts; None on later ranks before the first one has written it.
        fresh: the run starts over, whatever its folder contains: later ranks may look before the first one renames it.
        settings: key → value of what the config must have at all starts.
        training: key → value of what it may change, with which further steps are computed in another way.
        recorded: the start trains, and the folder says so.
    """

    folder: Path
    complete: bool
    run_id: str | None
    fresh: bool
    settings: dict[str, Any]
    training: dict[str, Any]
    _config: dict[str, Any]
    _overrides: list[str]
    _time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    recorded: bool = False

    def open(self) -> None:
        """Create the folder of a new run and record it; an existing run is recorded when it trains again.

        With `run.fresh` an earlier folder of that name is renamed first. The folder is locked until the process ends.
        Only rank 0 writes.

        Raises:
            RunError: another process is training the run, or the folder cannot be created.
        """
        if rank() > 0:
            return
        if self.fresh:
            _rename_old(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self.folder} cannot be created: {error.strerror}; set run.root to another folder."
            ) from error
        _lock(self.folder)
        if not (self.folder / "config.yaml").is_file():
            self.record({"run": self.run_id, "job": _job(), "cwd": os.getcwd()})

    def record(self, identity: Mapping[str, Any]) -> None:
        """Record what trains from now on: config, overrides, code, and what the run depends on. Only rank 0 writes.

        The run is no longer complete or failed, if it was. Values that ran until now are kept in `identity.json` and
        `code.json`. Secrets are redacted.

        Args:
            identity: the record of `mmlab.runs.identity`.
        """
        if rank() > 0:
            return
        for ended in (DONE, FAILED):
            (self.folder / ended).unlink(missing_ok=True)
        self._write(IDENTITY, self._identity(identity))
        if self.recorded:
            return
        self.recorded = True
        self._write("code.json", self._code())
        write_text(self.folder / "config.yaml", yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True))
        write_text(self.folder / OVERRIDES, "".join(f"{redact_text(override)}\n" for override in self._overrides))

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """The record, with the values that it replaces and those of the config under `earlier`."""
        before = read_json(self.folder / IDENTITY) or {}
        replaced = {name: before[name] for name in differing(before, identity) if name in before}
        if not self.recorded and (config := _changed(self.folder, self._config)):
            replaced["config"] = config
        earlier = [*before.get("earlier", []), *([{"until": self._time, **replaced}] if replaced else [])]
        return {**before, **identity, "earlier": earlier}

    def _code(self) -> list[dict[str, Any]]:
        """The states of the code that the run was started with, each with the times of its starts."""
        states, now = read_json(self.folder / "code.json") or [], redact(code_state())
        states = states if isinstance(states, list) else [states]
        if not states or {**states[-1], "starts": None} != {**now, "starts": None}:
            states.append({"starts": [], **now})
        states[-1]["starts"].append(self._time)
        return states

    def _write(self, name: str, value: Any) -> None:
        write_json(self.folder / name, redact(value))


def prepare_run(cfg: DictConfig) -> Start:
    """Check that the run can start in its folder, `cfg.run.dir`; nothing is written. An existing folder is locked.

    Raises:
        ConfigError: the folder belongs to a run with another config, or is an address.
        RunError: another process is training the run.
    """
    folder = Path(cfg.run.dir)
    refuse_address(folder)
    config: Any = redact(OmegaConf.to_container(cfg, resolve=True))
    exists, complete = (folder / "config.yaml").is_file(), False
    if exists and os.access(folder, os.W_OK):  # a complete run may lie on a read-only disk
        _lock(folder)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    # Not read to start over, which is the remedy for a damaged file.
    identity = {} if cfg.run.fresh and not requeued else read_json(folder / IDENTITY) or {}
    # A requeued job repeats its command line, and must resume the run that it started.
    fresh = cfg.run.fresh and not (requeued and identity.get("job") == _job())
    if exists and not fresh:
        previous: Any = OmegaConf.to_container(load_run_config(folder), resolve=True)
        _check_same_run(folder, previous, config, stage_of(cfg))
        end = ("max_steps", "max_epochs")
        same_end = all(previous["trainer"][key] == config["trainer"][key] for key in end)
        complete = same_end and read_json(folder / DONE) is not None and _has_artifacts(folder, cfg)
    overrides: Any = []
    if HydraConfig.initialized():
        overrides = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    known = None if fresh else identity.get("run")
    run_id = known or (uuid.uuid4().hex if rank() == 0 else None)
    leaves, stage = dict(_leaves(config, "")), stage_of(cfg)
    settings = {key: value for key, value in leaves.items() if not _may_change(key, stage)}
    training = {key: value for key, value in leaves.items() if _changes_steps(key)}
    return Start(folder, complete, run_id, fresh, settings, training, config, overrides)


def _has_artifacts(folder: Path, cfg: DictConfig) -> bool:
    """Whether the folder of every trained part is there; without one, a start saves them from the last checkpoint."""
    return all((folder / "artifacts" / name.split(".")[0]).is_dir() for name in cfg.stage.trainable)


def _job() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def read_json(path: Path) -> Any:
    """The content of a file of ours, None if there is none.

    Raises:
        RunError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); restore it, or start over with run.fresh=true.") from None


def _changed(folder: Path, config: Any) -> dict[str, Any]:
    """The leaves of the folder's config that `config` replaces, with their values in the folder."""
    if not (folder / "config.yaml").is_file():
        return {}
    old, new = dict(_leaves(OmegaConf.to_container(load_run_config(folder)), "")), dict(_leaves(config, ""))
    return {key: value for key, value in old.items() if new.get(key) != value}


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
    if rank() == 0:
        _LOCKS.append(claim(folder / LOCK, "is training"))


def finish(folder: Path, metrics: dict[str, Any]) -> None:
    """Mark a run as complete, with its last metrics; called after everything else is written."""
    write_json(folder / DONE, redact(metrics))


def find_run(name: str, root: str | Path) -> Path:
    """Return the folder of a run.

    Args:
        name: the folder itself, the run's name in `root`, or its recipe (`llava/align_tiny`), also if an override
            gave the run another name and it is the only complete run of that recipe.
        root: the folder of all runs.

    Raises:
        ConfigError: no such run.
    """
    for folder in (Path(name), Path(root, name), Path(root, name.replace("/", "-"))):
        if (folder / "config.yaml").is_file():
            return folder
    if (only := only_run_of(name, Path(root))) is not None:
        return only
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


def _check_same_run(folder: Path, previous: Any, config: Any, stage: type | None) -> None:
    """Refuse a config that describes another run than the one in the folder."""
    old, new = dict(_leaves(previous, "")), dict(_leaves(config, ""))
    keys = sorted(old.keys() | new.keys())
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            continue  # empty in one of the configs; its keys in the other follow
        if not _may_change(key, stage) and old.get(key) != new.get(key):
            raise ConfigError(
                f"{folder} contains a run with {key}={old.get(key)}, not {new.get(key)}; "
                "give another run.name, or remove the folder."
            )


def _may_change(key: str, stage: type | None) -> bool:
    """Whether a run may be resumed with another value of a key."""
    return is_execution(key, stage) or any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)


def _changes_steps(key: str) -> bool:
    """Whether a key that may change affects how a step is computed, not only when the run validates, logs or ends."""
    return key in CHANGES_STEPS or key.startswith("callbacks.ema.")


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and value of every leaf."""
    if isinstance(node, dict | list) and node:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    else:
        yield where, node
