"""`mmlab train -m`: runs the points of a sweep, each as a run, and writes their table."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.errors import ConfigError, RunError
from mmlab.config.multirun import Multirun
from mmlab.runs.disk import claim, write_text
from mmlab.runs.naming import stage_of, sweep_name
from mmlab.runs.redact import redact_text
from mmlab.runs.run import LOCK
from mmlab.runs.sweep.launcher import PointLauncher
from mmlab.runs.sweep.local import receiving
from mmlab.runs.sweep.points import Points


def sweep(multirun: Multirun, task: TaskFunction) -> None:
    """Run the points of a sweep that are missing or failed; each is the same run as outside the sweep.

    On this machine a point is a process; in a job of submitit it is a call of `task`. The table in
    `<run.root>/sweeps/<sweep>` is updated after each point.

    Raises:
        ConfigError: a point's config is invalid; the points of a grid are all checked before the first runs.
        RunError: some points failed; the others were run.
        StoppedError: a signal stopped the sweep, after it was passed on to the running points.
    """
    cfg = multirun.cfg
    _complete_config(multirun)
    folder = Path(cfg.run.root, "sweeps", cfg.run.sweep)
    batches = multirun.grid() if multirun.plugin("sweeper") == "BasicSweeper" else None
    total = cfg.hydra.sweeper.get("n_trials") if batches is None else sum(map(len, batches))
    points = Points(multirun, cfg.run.sweep, total)
    context = HydraContext(config_loader=multirun.loader, callbacks=Callbacks())
    sweeper: Any = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=cfg)
    # The sweepers of plugins are wrappers.
    inner = getattr(sweeper, "sweeper", sweeper)
    launcher = inner.launcher = PointLauncher(points, folder, inner.launcher)
    if batches is None:
        with exclusive(folder, multirun), receiving(launcher.stop), launcher.reporting():
            _search(sweeper, launcher)
        return
    taken = points.take([overrides for batch in batches for overrides in batch])
    complete = sum(point.done for point in points.all.values())
    print(f"sweep {cfg.run.sweep}: {len(points.all)} points, {complete} of them complete already", flush=True)
    with exclusive(folder, multirun), receiving(launcher.stop), launcher.reporting():
        for batch in batches:
            launcher.run([taken.pop(0) for _ in batch])


def _complete_config(multirun: Multirun) -> None:
    """Set the sweep's name and the seed of a search in the config that its points have in common."""
    cfg = multirun.cfg
    with open_dict(cfg):
        cfg.run.sweep = cfg.run.sweep or _name(multirun)
        sampler = OmegaConf.select(cfg, "hydra.sweeper.sampler")
        if isinstance(sampler, DictConfig) and "seed" in sampler and sampler.seed is None:
            # A repeated search then suggests the same points, whose runs exist.
            sampler.seed = cfg.seed


def _name(multirun: Multirun) -> str:
    choices: Any = OmegaConf.to_container(multirun.cfg.hydra.runtime.choices, resolve=False)
    swept = {override.partition("=")[0] for override in multirun.swept}
    fixed = {group: option for group, option in choices.items() if group not in swept}
    return sweep_name(fixed, [*multirun.params, *multirun.overrides], stage_of(multirun.cfg))


def _search(sweeper: Any, launcher: PointLauncher) -> None:
    """Let a sweeper suggest points until it has done its trials."""
    multirun = launcher.points.multirun
    if not multirun.swept and not OmegaConf.select(multirun.cfg, "hydra.sweeper.custom_search_space"):
        raise ConfigError(
            "There is nothing to search; give a key an interval or values: 'optim.lr=interval(1e-4,1e-2)'."
        )
    _quieten()
    try:
        sweeper.sweep(multirun.overrides)
    except RuntimeError as error:
        # The plugin raises this at the end of a grid whose last trial failed.
        if "Study.stop" not in str(error):
            raise
    except (ValueError, TypeError, NotImplementedError) as error:
        if not launcher.points.all:
            raise ConfigError(f"The search cannot start: {' '.join(str(error).split()).rstrip('.')}.") from error
        if launcher.best() is not None:
            raise
        if not launcher.failed():
            raise RunError(f"No point has a finite {launcher.metric}.") from error


def _quieten() -> None:
    """Silence the output of a search for each trial; the table contains it."""
    import logging

    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(logging.ERROR)


@contextlib.contextmanager
def exclusive(folder: Path, multirun: Multirun) -> Iterator[None]:
    """Create the sweep's folder and lock it; remove it again if no point has a valid config.

    Raises:
        RunError: another process is running the sweep.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with claim(folder / LOCK, "is running the sweep in"):
        text = "".join(f"{redact_text(override)}\n" for override in multirun.overrides)
        write_text(folder / "overrides.txt", text)
        try:
            yield
        except ConfigError:
            if not (folder / "table.csv").exists():
                shutil.rmtree(folder)
            raise
