"""`mmlab train -m`: the points of a sweep as runs of their own, and the table of them."""

import contextlib
import fcntl
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
from mmlab.runs.naming import stage_of, sweep_name
from mmlab.runs.redact import redact_text
from mmlab.runs.sweep.launcher import PointLauncher
from mmlab.runs.sweep.local import receiving
from mmlab.runs.sweep.points import Points


def sweep(multirun: Multirun, task: TaskFunction) -> None:
    """Run what is missing or failed of a sweep, each point as the run that it is on its own.

    On this machine a point is a process of its own; in a job of submitit it is a call of `task`. The table in
    `<run.root>/sweeps/<sweep>` is written anew after each point.

    Raises:
        ConfigError: a point's config is wrong; of a grid no point has run then.
        RunError: points failed; the others were run.
        StoppedError: a signal stopped it; the points that ran have got the signal too.
    """
    cfg = multirun.cfg
    _settle(multirun)
    folder = Path(cfg.run.root, "sweeps", cfg.run.sweep)
    batches = multirun.grid() if multirun.plugin("sweeper") == "BasicSweeper" else None
    total = cfg.hydra.sweeper.get("n_trials") if batches is None else sum(map(len, batches))
    points = Points(multirun, cfg.run.sweep, total)
    context = HydraContext(config_loader=multirun.loader, callbacks=Callbacks())
    sweeper: Any = Plugins.instance().instantiate_sweeper(hydra_context=context, task_function=task, config=cfg)
    # Plugins for searches wrap what does the work.
    inner = getattr(sweeper, "sweeper", sweeper)
    launcher = inner.launcher = PointLauncher(points, folder, inner.launcher)
    if batches is None:
        with alone(folder, multirun), receiving(launcher.stop), launcher.reporting():
            _search(sweeper, launcher)
        return
    taken = points.take([overrides for batch in batches for overrides in batch])
    complete = sum(point.done for point in points.all.values())
    print(f"sweep {cfg.run.sweep}: {len(points.all)} points, {complete} of them complete already", flush=True)
    with alone(folder, multirun), receiving(launcher.stop), launcher.reporting():
        for batch in batches:
            launcher.run([taken.pop(0) for _ in batch])


def _settle(multirun: Multirun) -> None:
    """Write the sweep's name, and the seed of a search, into the config that its points have in common."""
    cfg = multirun.cfg
    with open_dict(cfg):
        cfg.run.sweep = cfg.run.sweep or _name(multirun)
        sampler = OmegaConf.select(cfg, "hydra.sweeper.sampler")
        if isinstance(sampler, DictConfig) and "seed" in sampler and sampler.seed is None:
            # The same search again suggests the same points, whose runs are there already.
            sampler.seed = cfg.seed


def _name(multirun: Multirun) -> str:
    choices: Any = OmegaConf.to_container(multirun.cfg.hydra.runtime.choices, resolve=False)
    swept = {override.partition("=")[0] for override in multirun.swept}
    fixed = {group: option for group, option in choices.items() if group not in swept}
    return sweep_name(fixed, [*multirun.params, *multirun.overrides], stage_of(multirun.cfg))


def _search(sweeper: Any, launcher: PointLauncher) -> None:
    """Let a sweeper suggest points until it has had its trials."""
    multirun = launcher.points.multirun
    if not multirun.swept and not OmegaConf.select(multirun.cfg, "hydra.sweeper.custom_search_space"):
        raise ConfigError(
            "There is nothing to search; give a key an interval or values: 'optim.lr=interval(1e-4,1e-2)'."
        )
    _quieten()
    try:
        sweeper.sweep(multirun.overrides)
    except RuntimeError as error:
        # So the plugin ends a grid sampler's search whose last trial failed.
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
    """Leave out what a search says at each trial: the table says it."""
    import logging

    logging.getLogger("hydra_plugins").setLevel(logging.CRITICAL)
    with contextlib.suppress(ImportError):
        import optuna

        optuna.logging.set_verbosity(logging.ERROR)


@contextlib.contextmanager
def alone(folder: Path, multirun: Multirun) -> Iterator[None]:
    """Make the sweep's folder, and keep a second start of the same sweep out of it.

    Raises:
        RunError: the sweep is running.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"The sweep {folder.name} is running already, in another process.") from error
        except OSError:
            pass  # a file system without locks
        text = "".join(f"{redact_text(override)}\n" for override in multirun.overrides)
        (folder / "overrides.txt").write_text(text, encoding="utf-8")
        try:
            yield
        except ConfigError:
            if not (folder / "table.csv").exists():
                shutil.rmtree(folder)
            raise
