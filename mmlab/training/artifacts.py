"""What a run leaves behind: one folder per trained part, with a card, from which the next stage starts."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmlab.config.errors import ConfigError
from mmlab.runs.disk import DRAFT, replacing, to_json
from mmlab.runs.finished_runs import finished
from mmlab.runs.ranks import rank
from mmlab.training.lora import adapter_weights, is_adapter, merge_adapter, save_adapter
from mmlab.training.trainable import HasUnused, parts_of
from mmlab.weights import (
    CARD,
    content_hash,
    file_hashes,
    fill,
    hash_of,
    note_identity,
    require_finite,
    verify_files,
)

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


@runtime_checkable
class Dequantizable(Protocol):
    """A part that may have 4-bit weights."""

    def dequantize(self) -> None: ...


def describe(module: nn.Module, trained: bool = False) -> dict[str, Any]:
    """What a part that was trained with `module` depends on; `trained` as for `content_hash`."""
    return {"content_hash": content_hash(module, trained), **_properties(module)}


def _properties(module: nn.Module) -> dict[str, Any]:
    return module.describe() if isinstance(module, SavesItself) else {}


def describe_base(model: nn.Module, names: Iterable[str], sources: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What parts are before they get an adapter, by name.

    Args:
        model: filled.
        names: of the parts.
        sources: the artifact that each part was filled from, as `fill_parts` returns it.

    Returns:
        Facts with the `content_hash` and the `source`: the artifact or checkpoint with exactly these weights, None if
        there is none, because an earlier adapter is merged into them.
    """
    bases = {}
    for name in names:
        part = parts_of(model)[name]
        own, artifact = getattr(getattr(part, "settings", None), "source", None), sources.get(name)
        source = own if artifact is None else None if is_adapter(artifact) else str(artifact)
        bases[name] = {**describe(part), "source": source}
    return bases


def describe_frozen(model: nn.Module, trained: Sequence[str]) -> dict[str, Any]:
    """What the parts beside the trained ones are, by name; called before a trainer casts them to its precision.

    Args:
        model: filled; its direct children are the parts.
        trained: names of the trained parts, or dotted names inside a part.
    """
    names = {name.split(".")[0] for name in trained}
    return {name: describe(part) for name, part in parts_of(model).items() if name not in names}


def save_parts(
    model: nn.Module,
    trained: Sequence[str],
    folder: Path,
    card: dict[str, Any],
    against: dict[str, Any],
    bases: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Path]:
    """Write `folder/<part>/` for every trained part: weights, config, card with the hash of every file.

    A folder is written under another name and renamed, so it is never incomplete.

    Args:
        model: its direct children are the parts.
        trained: names of the trained parts, or dotted names inside a part, which is then written whole; the other
            parts are described in the card, not copied.
        folder: usually `runs/<name>/artifacts`.
        card: facts about the run (name, stage, prompt).
        against: what the other parts are, as `describe_frozen` returns it.
        bases: what each part with an adapter was before it had one, as `describe_base` returns it. Only the adapter is
            written, as a folder of peft.

    Returns:
        The folders written.

    Raises:
        RunError: weights or statistics that are not finite, or a disk that is full; nothing is written.
    """
    parts = parts_of(model)
    for name in trained:
        part = name.split(".")[0]
        require_finite(parts[part], f"The trained part {part}")
    written = []
    for name in dict.fromkeys(name.split(".")[0] for name in trained):
        part = parts[name]
        for old in folder.glob(f"{DRAFT}*-{name}*"):  # of killed processes
            shutil.rmtree(old)
        with replacing(folder / name) as draft:
            draft.mkdir()
            facts = {"part": name, "class": type(part).__name__, **card}
            if bases and name in bases:
                weights: Mapping[str, Tensor] = adapter_weights(part)
                save_adapter(part, draft, bases[name]["source"])
                facts |= {"content_hash": merged_hash(bases[name]["content_hash"], weights), "base": dict(bases[name])}
            else:
                weights = part.state_dict()
                if isinstance(part, SavesItself):
                    part.save(draft)
                else:
                    save_file({key: value.contiguous() for key, value in weights.items()}, draft / WEIGHTS)
                facts |= {"content_hash": content_hash(part, trained=True)}
            shapes = {key: list(value.shape) for key, value in weights.items()}
            write_card(draft, {**facts, **_properties(part), "against": against, "shapes": shapes})
        written.append(folder / name)
    return written


def write_card(folder: Path, facts: dict[str, Any]) -> None:
    """Write the card of a part whose files are complete: `facts`, and the hash of every file."""
    (folder / CARD).write_text(to_json({**facts, "files": file_hashes(folder)}, indent=2) + "\n")


def fill_parts(
    model: nn.Module, runs: Sequence[str | Path], quantized: bool = True, merge: bool = True
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
        artifacts = _artifacts(Path(run))
        _warn_of_extension(Path(run), artifacts)
        fitting = {name: path for name, path in artifacts.items() if name in parts}
        if not fitting:
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
            continue
        for module in part.modules():
            if isinstance(module, StartsPretrained):
                source = getattr(getattr(module, "settings", None), "source", None)
                if source is not None:
                    verify_files(Path(source).expanduser())  # it may be an artifact, too
                _load_pretrained(module, name)
    for part in parts.values() if not quantized else ():
        if isinstance(part, Dequantizable):
            part.dequantize()
    for name, paths in adapters.items():
        for path in paths:
            _merge(parts[name], name, path)
            sources[name] = path
    _refuse_strangers(sources, parts)
    return sources


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


def content_hashes(folder: Path) -> dict[str, str]:
    """Part → hash of its weights, of all parts that a run trained or used frozen, without loading them."""
    hashes: dict[str, str] = {}
    for path in _artifacts(folder).values():
        card = json.loads((path / CARD).read_text())
        hashes |= {name: other.get("content_hash") for name, other in card.get("against", {}).items()}
        hashes[path.name] = card.get("content_hash")
    return hashes


def _artifacts(run: Path) -> dict[str, Path]:
    """Part → its folder, of all parts that a run has left."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"artifacts/[!.]*/{CARD}"))}


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


def merged_hash(base: str | None, adapter: Mapping[str, Tensor]) -> str:
    """The identity of weights with an adapter: of the base's hash and the adapter's values."""
    return hashlib.sha256(f"{base} {hash_of(adapter, trained=True)}".encode()).hexdigest()


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
