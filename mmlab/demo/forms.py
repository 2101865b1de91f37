"""What generative runs can be asked for on a page, and what they draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mmlab.config.errors import ConfigError


@dataclass(frozen=True)
class Form:
    """The fields of a form.

    Attributes:
        reads: what a run's conditioner reads: `class`, `text` or `none`.
        classes: the names of its classes.
        settings: the sampler's settings by name, as the run has them.
        samplers: names of the samplers to choose from; empty: there is no choice.
        sizes: sides of squares, or [height, width], to choose from, first the trained one.
    """

    reads: str
    classes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    samplers: list[str] = field(default_factory=list)
    sizes: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    """Images in a folder.

    Attributes:
        files: of the images.
        captions: what each of them is.
        strip: file of their intermediate steps.
        unread: what the text encoder does not read of the prompt.
    """

    files: list[Path]
    captions: list[str]
    strip: Path
    unread: str = ""


OnStep = Callable[[int, int], None]
"""Called with the steps taken and all of them; what it raises ends the drawing."""


class Drawer(Protocol):
    """A run that draws.

    Attributes:
        name: of the run.
        form: what it can be asked for.
    """

    name: str
    form: Form

    def __call__(self, settings: dict[str, Any], out: Path, on_step: OnStep) -> Drawn:
        """Draw images to files in `out`, as `mmlab sample` with these settings.

        Raises:
            UserError: settings that the run does not have.
        """
        ...


def common_form(drawers: Sequence[Drawer]) -> Form:
    """The form for all runs, with the settings of the first one.

    Raises:
        ConfigError: one reads something else than another.
    """
    first, *others = (drawer.form for drawer in drawers)
    for other in others:
        if other.reads != first.reads:
            raise ConfigError(
                f"{drawers[0].name} and {drawers[1].name} cannot be compared: one of them reads a condition "
                f"({first.reads}) that the other one does not ({other.reads})."
            )
    return Form(
        first.reads,
        first.classes,
        {name: value for name, value in first.settings.items() if all(name in other.settings for other in others)},
        [name for name in first.samplers if all(name in other.samplers for other in others)],
        [size for size in first.sizes if all(size in other.sizes for other in others)],
    )
