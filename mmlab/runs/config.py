"""Settings of a run's identity and of a sweep."""

from dataclasses import dataclass

from mmlab.config.fields import Settings, choice


@dataclass
class RunConfig(Settings):
    """The identity of a run and where it lies."""

    # None: the recipe (or <model>-<stage>) and 8 hex digits of what was overridden; set when composed.
    name: str | None = None
    root: str = "runs"
    dir: str = "${run.root}/${run.name}"
    fresh: bool = False  # start over; the run of that name is kept beside it
    sweep: str | None = None  # the sweep that the run is a point of


@dataclass
class SweepConfig(Settings):
    """What the points of a sweep (`-m`) are compared by."""

    metric: str = "train/loss"  # a name in the runs' done.json: train/loss, val/loss, …
    direction: str = choice("minimize", "maximize")
