"""What a run leaves behind: one folder per trained part, with a card, from which the next stage starts."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.training.trainable import parts_of
from mmlab.weights import fill, fingerprint

CARD = "card.json"
WEIGHTS = "model.safetensors"


@runtime_checkable
class SavesItself(Protocol):
    """A part that is written as a folder of its own format (a transformers folder)."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def describe(self) -> dict[str, Any]: ...


@runtime_checkable
class StartsPretrained(Protocol):
    """A module whose settings may name pretrained weights; its constructor does not read them."""

    def load_pretrained(self) -> None: ...


def describe(module: nn.Module) -> dict[str, Any]:
    """What a part that was trained with `module` depends on."""
    extra = module.describe() if isinstance(module, SavesItself) else {}
    return {"fingerprint": fingerprint(module), **extra}


def save_parts(model: nn.Module, trained: Sequence[str], folder: Path, card: dict[str, Any]) -> list[Path]:
    """Write `folder/<part>/` for every trained part: weights, config, card.

    Args:
        model: its direct children are the parts.
        trained: names of the trained parts, or dotted names inside a part, which is then written whole; the other
            parts are described in the card, not copied.
        folder: usually `runs/<name>/artifacts`.
        card: facts about the run (name, stage, prompt).

    Returns:
        The folders written.
    """
    parts = parts_of(model)
    names = list(dict.fromkeys(name.split(".")[0] for name in trained))
    against = {name: describe(part) for name, part in parts.items() if name not in names}
    written = []
    for name in names:
        part, target = parts[name], folder / name
        target.mkdir(parents=True, exist_ok=True)
        if isinstance(part, SavesItself):
            part.save(target)
        else:
            save_file({key: value.contiguous() for key, value in part.state_dict().items()}, target / WEIGHTS)
        shapes = {key: list(value.shape) for key, value in part.state_dict().items()}
        facts = {"part": name, "class": type(part).__name__, **card, **describe(part), "against": against}
        (target / CARD).write_text(json.dumps({**facts, "shapes": shapes}, indent=2) + "\n")
        written.append(target)
    return written


def fill_parts(model: nn.Module, runs: Iterable[str | Path]) -> dict[str, Path]:
    """Fill the model's parts: from the artifacts of earlier runs, of which a later one wins, or else with the
    pretrained weights that their settings name. The other parts stay as they were initialized.

    Args:
        model: its direct children are the parts.
        runs: run folders that hold `artifacts/<part>/`.

    Returns:
        The artifact that each part was filled from.

    Raises:
        ConfigError: a run without a fitting part, weights of other names or shapes, or a part that was trained with
            frozen parts other than these.
    """
    parts = parts_of(model)
    sources: dict[str, Path] = {}
    for run in runs:
        artifacts = _artifacts(Path(run))
        fitting = {name: path for name, path in artifacts.items() if name in parts}
        if not fitting:
            has = f"it has {', '.join(artifacts)}." if artifacts else "it has no artifacts; has it finished?"
            raise ConfigError(f"{run} holds no artifact for {', '.join(parts)}: {has}")
        sources.update(fitting)
    for name, part in parts.items():
        if name in sources:
            _load(part, sources[name])
            continue
        for module in part.modules():
            if isinstance(module, StartsPretrained):
                module.load_pretrained()
    for name, path in sources.items():
        _refuse_strangers(name, path, parts)
    return sources


def fingerprints(folder: Path) -> dict[str, str]:
    """Part → fingerprint of its weights, of all parts that a run trained or used frozen, without loading them."""
    prints: dict[str, str] = {}
    for path in _artifacts(folder).values():
        card = json.loads((path / CARD).read_text())
        prints |= {name: other["fingerprint"] for name, other in card["against"].items()}
        prints[card["part"]] = card["fingerprint"]
    return prints


def _artifacts(run: Path) -> dict[str, Path]:
    """Part → its folder, of all parts that a run has left."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"artifacts/*/{CARD}"))}


def _load(part: nn.Module, path: Path) -> None:
    if isinstance(part, SavesItself):
        part.load(path)
    elif (path / WEIGHTS).is_file():
        fill(part, load_file(path / WEIGHTS), path)
    else:
        raise ConfigError(f"{path} does not fit the model: it has no {WEIGHTS}, so it is not a {type(part).__name__}.")


def _refuse_strangers(name: str, path: Path, parts: dict[str, nn.Module]) -> None:
    """Check the parts with which the part `name` was trained: a connector is useless with another vision encoder."""
    against = json.loads((path / CARD).read_text()).get("against", {})
    for other, expected in against.items():
        if other not in parts:
            continue
        actual = describe(parts[other])
        for field, value in expected.items():
            if actual.get(field) != value:
                raise ConfigError(
                    f"{path} was trained with another {other}: its {field} was {value}, not "
                    f"{actual.get(field)}. Load the same {other}, or train {name} again."
                )
