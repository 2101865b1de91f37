"""Filling the parts of a model: from the artifacts of earlier runs, or with the weights that their settings name."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.config.schemas import schema_of
from mmlab.runs.finished_runs import finished
from mmlab.runs.ranks import rank
from mmlab.training.artifacts import WEIGHTS, SavesItself, artifacts_of, describe
from mmlab.training.lora import is_adapter, merge_adapter
from mmlab.training.trainable import HasUnused, parts_of
from mmlab.weights import CARD, fill, note_identity, require_finite, verify_files


@runtime_checkable
class StartsPretrained(Protocol):
    """A module whose settings may name pretrained weights; its constructor does not read them."""

    def load_pretrained(self) -> None: ...


@runtime_checkable
class Dequantizable(Protocol):
    """A part that may have 4-bit weights."""

    def dequantize(self) -> None: ...


def fill_parts(
    model: nn.Module,
    runs: Sequence[str | Path],
    quantized: bool = True,
    merge: bool = True,
    left_out: Sequence[str] = (),
) -> dict[str, Path]:
    """Fill the model's parts: from the artifacts of earlier runs, of which a later one wins, or else with the
    pretrained weights that their settings name. Then adapters among the artifacts are merged into the parts, in the
    order of the runs. The other parts stay as they were initialized. A run that was extended and has not finished since
    has the artifacts of its earlier end, which a warning says.

    Args:
        model: its direct children are the parts.
        runs: run folders that hold `artifacts/<part>/`.
        quantized: keep 4-bit weights as they are, with their adapters beside them; otherwise they become plain ones of
            the same values, into which adapters are merged.
        merge: with the adapters of the last run.
        left_out: names of parts without which the model was built; runs may have no others.

    Returns:
        The artifact that each part was filled from; the last one, if it has adapters.

    Raises:
        ConfigError: a run without a fitting part, weights of other names or shapes, a part that was trained with
            frozen parts other than these, or an adapter that was trained on other weights.
        RunError: an artifact whose files are not those that were written.
    """
    parts = parts_of(model)
    sources: dict[str, Path] = {}
    adapters: dict[str, list[Path]] = {}
    for run in runs:
        artifacts = artifacts_of(Path(run))
        _warn_of_extension(Path(run), artifacts)
        fitting = {name: path for name, path in artifacts.items() if name in parts}
        if not fitting and not artifacts.keys() & set(left_out):
            none = "it has no artifacts; the same `mmlab train` command completes it."
            has = f"it has {', '.join(artifacts)}." if artifacts else none
            raise ConfigError(f"{run} holds no artifact for {', '.join(parts)}: {has}")
        for name, path in fitting.items():
            if is_adapter(path) and not merge and run == runs[-1]:
                continue
            if is_adapter(path):
                adapters.setdefault(name, []).append(path)
            else:
                sources[name] = path
                adapters.pop(name, None)
    for name, part in parts.items():
        if name in sources:
            _load(part, sources[name])
        else:
            _start_pretrained(part, name)
    for part in parts.values() if not quantized else ():
        if isinstance(part, Dequantizable):
            part.dequantize()
    for name, paths in adapters.items():
        for path in paths:
            _merge(parts[name], name, path)
            sources[name] = path
    # Parts that only training uses may be others in a later run, such as the encoder of an alignment.
    settings = schema_of(f"{type(model).__module__}.{type(model).__name__}")
    training_only = getattr(settings, "training_only", ())
    _refuse_strangers(sources, {name: part for name, part in parts.items() if name not in training_only})
    return sources


def _start_pretrained(part: nn.Module, name: str) -> None:
    """Fill the modules of a part that start pretrained."""
    for module in part.modules():
        if isinstance(module, StartsPretrained):
            source = getattr(getattr(module, "settings", None), "source", None)
            if source is not None:
                verify_files(Path(source).expanduser())  # it may be an artifact, too
            _load_pretrained(module, name)


def random_parts(model: nn.Module, sources: Mapping[str, Path]) -> list[str]:
    """Return the parts with frozen weights that are random: neither an artifact nor pretrained weights filled them.

    Args:
        model: filled, with its trainable weights marked.
        sources: the artifact that each part was filled from, as `fill_parts` returns it.
    """
    unused = {weight for module in model.modules() if isinstance(module, HasUnused) for weight in module.unused()}
    frozen = {
        name
        for name, part in parts_of(model).items()
        if any(not weight.requires_grad and weight not in unused for weight in part.parameters())
    }
    return [
        name
        for name, part in parts_of(model).items()
        if name in frozen and name not in sources and not _is_filled(part)
    ]


def _is_filled(part: nn.Module) -> bool:
    """Whether a part starts from weights of its own; one of two encoders, only if both do."""
    starting = list(_starting(part))
    return bool(starting) and all(map(_reads_weights, starting))


def _starting(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules that may start from weights of their own."""
    if isinstance(module, StartsPretrained):
        yield module
    else:
        for child in module.children():
            yield from _starting(child)


def _reads_weights(module: nn.Module) -> bool:
    """Whether the settings of a module that `StartsPretrained` name such weights, which it has read."""
    settings = getattr(module, "settings", None)
    return getattr(settings, "source", "") is not None and getattr(settings, "init", "pretrained") == "pretrained"


def _warn_of_extension(run: Path, artifacts: Mapping[str, Path]) -> None:
    """Say so if a run was extended and has not finished since: its artifacts are of the earlier end."""
    if not artifacts or rank() or finished(run) or not (run / "config.yaml").is_file():
        return
    steps = {json.loads((path / CARD).read_text()).get("steps") for path in artifacts.values()} - {None}
    of = f"of step {max(steps)}" if steps else "of an earlier end"
    print(
        f"WARNING: {run} is not complete, and its artifacts are {of}: it was extended, or stopped while it saved them; "
        "the same `mmlab train` command completes it.",
        file=sys.stderr,
    )


def _load_pretrained(module: StartsPretrained, name: str) -> None:
    """Fill a module from its own source; one of a user's package is checked like the others."""
    kind = type(module)
    try:
        module.load_pretrained()
    except OSError as error:
        raise ConfigError(f"model.{name}: {kind.__name__} cannot load its weights: {error}.") from error
    if isinstance(module, nn.Module) and not kind.__module__.startswith("mmlab."):
        require_finite(module, f"model.{name} ({kind.__name__})")


def _load(part: nn.Module, path: Path) -> None:
    verify_files(path)
    if isinstance(part, SavesItself):
        part.load(path)
    elif (path / WEIGHTS).is_file():
        fill(part, load_file(path / WEIGHTS), path)
    else:
        raise ConfigError(f"{path} does not fit the model: it has no {WEIGHTS}, so it is not a {type(part).__name__}.")


def _merge(part: nn.Module, name: str, path: Path) -> None:
    """Merge an adapter into the weights that it was trained on."""
    verify_files(path)
    card = json.loads((path / CARD).read_text())
    needed, actual = card["base"]["content_hash"], describe(part)["content_hash"]
    if needed not in (None, actual):  # unknown for an adapter of another code base
        raise ConfigError(
            f"{path} is an adapter of another {name}: the hash of its weights was {needed}, not {actual}. Load the "
            f"{name} that it was trained on, or train it again."
        )
    merge_adapter(part, path)
    note_identity(part, card["content_hash"])


def _refuse_strangers(sources: dict[str, Path], parts: dict[str, nn.Module]) -> None:
    """Check what each loaded part was trained beside: a connector is useless with another vision encoder."""
    actual: dict[str, dict[str, Any]] = {}
    for name, path in sources.items():
        against = json.loads((path / CARD).read_text()).get("against", {})
        for other in against.keys() & parts.keys():
            actual.setdefault(other, describe(parts[other]))
            for field, value in against[other].items():
                if field in actual[other] and actual[other][field] != value:
                    raise ConfigError(
                        f"{path} was trained with another {other}: its {field} was {value}, not "
                        f"{actual[other][field]}. Load the same {other}, or train {name} again."
                    )
