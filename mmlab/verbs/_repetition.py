"""Scores that can be repeated: what their file says of a command and its inputs, and the comparison with a second run.

Imported by the settings of `mmlab eval`, so torch is loaded only where it is used.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.redact import redact

OWN = ("scores", "out")
"""Settings of a command that are not those of the scores."""
ABOUT = ("run", "settings", "inputs", "machine", "bad_samples", "bad_samples_of_train_from")
"""Entries of a file that are no scores."""
SHOWN = 3
"""Numbers that are named if they differ."""


def take_settings(node: Any, overrides: Sequence[str]) -> None:
    """Set what the command line leaves open to the settings in the file `node.scores`.

    Raises:
        ConfigError: no such file, or one without settings.
    """
    named = {override.lstrip("+~").split("=")[0].split("@")[0].replace("/", ".") for override in overrides}
    for key, value in read_scores(node.scores)["settings"].items():
        if key == "sampler":
            # As `DrawConfig` keeps it: only what was chosen.
            if not any(name.split(".")[0] == key for name in named):
                node[key] = value
            continue
        for name, leaf in _leaves({key: value}):
            if not any(name == other or name.startswith(f"{other}.") for other in named):
                try:
                    OmegaConf.update(node, name, leaf)
                except OmegaConfBaseException as error:
                    reason = str(error).splitlines()[0].removesuffix(".")
                    raise ConfigError(f"scores={node.scores}: its setting {name} cannot be used: {reason}.") from error


def read_scores(path: str) -> dict[str, Any]:
    """The scores in a file, with the settings and inputs that they were computed from.

    Raises:
        ConfigError: no such file, or scores without these.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        record = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(f"scores={path} cannot be read: {reason}.") from error
    parts = [record.get(key) for key in ("settings", "inputs", "machine")] if isinstance(record, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(
            f"scores={path} does not hold the settings of its scores; only those of `mmlab eval` of models that draw "
            "or reconstruct images can be repeated."
        )
    if "${" in text:
        raise ConfigError(f"scores={path} contains an interpolation; a file of scores holds plain values.")
    return record


def provenance(cfg: DictConfig, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of scores says of its command.

    Args:
        cfg: of the command.
        folder: of the run.
        inputs: hashes of what the model is compared with, by setting.

    Returns:
        `settings`; `inputs`: `inputs`, and under `run` the hashes of the run's parts; `machine`.
    """
    import torch

    from mmlab.training.artifacts import content_hashes

    return {
        "settings": settings_of(cfg),
        "inputs": {"run": content_hashes(folder), **inputs},
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": _device(cfg)},
    }


def settings_of(cfg: DictConfig) -> dict[str, Any]:
    """The settings of a command that its scores depend on."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    return redact({key: value for key, value in settings.items() if key not in OWN})


def _device(cfg: DictConfig) -> str:
    import torch

    cuda = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if cuda else "cpu"


def check_inputs(cfg: DictConfig, now: Mapping[str, Any]) -> None:
    """Refuse to repeat scores, before anything is drawn, if other data or weights lie under the same names.

    Args:
        cfg: of the command; with `scores`.
        now: as `provenance` returns it.

    Raises:
        RunError: inputs whose setting was not changed.
    """
    before = read_scores(cfg.scores)
    changed = {key.split("=")[0] for key in _changes(before, now)}
    then, here = (dict(_leaves(record["inputs"])) for record in (before, now))
    other = []
    for name in sorted(then.keys() | here.keys()):
        key, _, part = name.partition(".") if name.startswith("run.") else (name, "", "")
        if then.get(name) != here.get(name) and key not in changed:
            where = f"{key}={OmegaConf.select(cfg, key)}{part and f' ({part})'}"
            other.append(f"{where} {_shown(here.get(name))}, not {(then.get(name) or 'none')[:8]}")
    if other:
        raise RunError(
            f"{cfg.scores} cannot be repeated, because its inputs are others now: {'; '.join(other)}. Leave out scores "
            "to score what is there."
        )


def comparison(path: str, now: Mapping[str, Any]) -> str:
    """A line that says whether scores equal those of the file, and else what differs."""
    before = read_scores(path)
    then, here = (dict(_numbers(scores)) for scores in (before, now))
    changes = _changes(before, now)
    notes = f"; changed: {', '.join(changes)}" if changes else ""
    differ = [name for name in here if then.get(name) != here[name]] + [name for name in then if name not in here]
    if not differ:
        return f"repeated: all {len(here)} numbers equal those of {path}{notes}"
    shown = ", ".join(f"{name} {here.get(name)}, not {then.get(name)}" for name in differ[:SHOWN])
    return f"not repeated: {len(differ)} of {len(here)} numbers differ from {path}: {shown}{notes}"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key=value, not value` of each setting and of each property of the machine that differs."""
    changes = []
    for part in ("settings", "machine"):
        then, here = (dict(_leaves(record[part])) for record in (before, now))
        for key in sorted(then.keys() | here.keys()):
            if then.get(key) != here.get(key) and not key.endswith("._target_"):
                changes.append(f"{key}={here.get(key)}, not {then.get(key)}")
    return changes


def _shown(value: str | None) -> str:
    return "is missing" if value is None else f"has hash {value[:8]}"


def _leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of each entry of a nested mapping; lists are values."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _numbers(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """All numbers among scores, by dotted name."""
    parts = {key: value for key, value in scores.items() if key not in ABOUT}
    for name, value in _leaves({**parts, "others": dict(enumerate(scores.get("others", ())))}):
        if isinstance(value, int | float):
            yield name, value
