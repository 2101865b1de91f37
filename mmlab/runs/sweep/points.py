"""The points of a sweep: the overrides, the run and the outcome of each."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from mmlab.config.errors import ConfigError, RunError
from mmlab.config.multirun import Multirun
from mmlab.runs.check import check
from mmlab.runs.finished_runs import DONE, finished
from mmlab.runs.naming import is_execution, stage_of
from mmlab.runs.redact import redact_text
from mmlab.runs.run import read_json


@dataclass(eq=False)
class Point:
    """One run of a sweep.

    Args:
        overrides: all overrides of its command line.
        label: the overrides that differ between points, with secrets redacted.
        name: the run's name, the same as outside a sweep.
        folder: the run's folder.
        number: its position, as `2/8`.
        done: the run is complete.
        failure: the reason why the run failed; None if it was not run.
    """

    overrides: list[str]
    label: dict[str, str]
    name: str
    folder: Path
    number: str = ""
    done: bool = False
    failure: str | None = None

    def record(self, failure: str | None) -> None:
        """Record the outcome of its run; a run that is not marked as complete has failed."""
        self.done = failure is None and finished(self.folder)
        self.failure = None if self.done else failure or "it ended without being complete"

    @property
    def status(self) -> str:
        return "complete" if self.done else "failed" if self.failure else "missing"

    @property
    def metrics(self) -> dict[str, Any]:
        """The last metrics of a complete run: steps, losses, …; otherwise empty."""
        return (read_json(self.folder / DONE) or {}) if self.done else {}

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.label.items()) or self.name


class Points:
    """All points of a sweep so far, in the order of their composition.

    Args:
        multirun: the command line.
        sweep: the sweep's name.
        total: the number of points, if known.
    """

    def __init__(self, multirun: Multirun, sweep: str, total: int | None):
        self.multirun = multirun
        self.sweep = sweep
        self.total = total
        self.all: dict[str, Point] = {}
        self._checked = False

    def take(self, batch: Iterable[Sequence[str]]) -> list[Point]:
        """Compose points, and run all checks of `mmlab train` on the first batch before any of them runs.

        Args:
            batch: each point's overrides.

        Returns:
            Their points; equal overrides give the same point.

        Raises:
            ConfigError: a point's config is invalid, or two points would be the same run.
        """
        pairs = [self._point(list(overrides)) for overrides in batch]
        if not self._checked:
            check_in_subprocess([(str(point), cfg) for point, cfg in pairs if not point.done])
            self._checked = True
        return [point for point, _ in pairs]

    def _point(self, overrides: list[str]) -> tuple[Point, DictConfig]:
        cfg = self.multirun.compose(overrides)
        cfg.run.sweep = self.sweep
        HydraConfig.instance().set_config(cfg)
        label = {key: value for key, _, value in (redact_text(o).partition("=") for o in self.multirun.own(overrides))}
        point = Point([*overrides, f"run.sweep={self.sweep}"], label, cfg.run.name, Path(cfg.run.dir))
        earlier = self.all.setdefault(point.name, point)
        if earlier is point:
            point.number = f"{len(self.all)}/{self.total}" if self.total else str(len(self.all))
            point.done = finished(point.folder) and not cfg.run.fresh
        elif earlier.overrides != point.overrides:
            raise ConfigError(self._collision(earlier, point, stage_of(cfg)))
        with open_dict(cfg):
            del cfg["hydra"]
        return earlier, cfg

    def _collision(self, one: Point, other: Point, stage: type | None) -> str:
        if any(override.startswith("run.name=") for override in self.multirun.overrides):
            return f"All points would be the run {one.name}: leave out run.name, or include the swept keys in it."
        keys = [key for key in one.label if is_execution(key.lstrip("+"), stage)]
        key = keys[0] if keys else next(iter(other.label), "run.name")
        reason = f"{key} affects only how a run is executed, not its result; " if keys else ""
        return f"'{one}' and '{other}' would be the same run {one.name}: {reason}give 'run.name={one.name}-${{{key}}}'."


def check_in_subprocess(configs: list[tuple[str, DictConfig]]) -> None:
    """Check configs in a process of their own, so that this one does not import torch.

    Raises:
        ConfigError: the first invalid config; the message names the point.
        RunError: the process was killed.
    """
    if not configs:
        return
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            pool.submit(check_all, configs).result()
    except BrokenProcessPool as error:
        raise RunError("The process that checked the points was killed.") from error


def check_all(configs: list[tuple[str, DictConfig]]) -> None:
    """Check (label, config) of each point.

    Raises:
        ConfigError: the first invalid config; the message names the point.
    """
    for label, cfg in configs:
        try:
            check(cfg)
        except ConfigError as error:
            raise ConfigError(f"At sweep point {label}: {error}") from None
