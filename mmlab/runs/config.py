"""Settings of a run's identity and of a sweep."""

from dataclasses import dataclass

from mmlab.config.fields import Settings, choice


@dataclass
class RunConfig(Settings):
    """The name of a run and its folder."""

    # None: the recipe (or <model>-<stage>), swapped options and 8 hex digits of the other overrides; set when composed.
    name: str | None = None
    root: str = "runs"  # folder of all runs
    dir: str = "${run.root}/${run.name}"
    fresh: bool = False  # start over; an existing run of that name is renamed to <dir>.1, .2, …
    sweep: str | None = None  # the sweep that the run belongs to


@dataclass
class SweepConfig(Settings):
    """How the points of a sweep (`-m`) are ranked."""

    metric: str = "train/loss"  # a name in the runs' done.json: train/loss, val/loss, …
    direction: str = choice("minimize", "maximize")
