"""What a run leaves behind: one folder per trained part, with a card, from which the next stage starts."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors.torch import save_file
from torch import Tensor, nn

from mmlab.runs.disk import DRAFT, replacing, to_json
from mmlab.training.lora import adapter_weights, is_adapter, save_adapter
from mmlab.training.trainable import parts_of
from mmlab.weights import CARD, content_hash, file_hashes, hash_of, require_finite

WEIGHTS = "model.safetensors"


@runtime_checkable
class SavesItself(Protocol):
    """A part that is written as a folder of its own format (a transformers folder)."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def describe(self) -> dict[str, Any]: ...


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


def content_hashes(folder: Path) -> dict[str, str]:
    """Part → hash of its weights, of all parts that a run trained or used frozen, without loading them."""
    hashes: dict[str, str] = {}
    for path in artifacts_of(folder).values():
        card = json.loads((path / CARD).read_text())
        hashes |= {name: other.get("content_hash") for name, other in card.get("against", {}).items()}
        hashes[path.name] = card.get("content_hash")
    return hashes


def artifacts_of(run: Path) -> dict[str, Path]:
    """Part → its folder, of all parts that a run has left."""
    return {path.parent.name: path.parent for path in sorted(run.glob(f"artifacts/[!.]*/{CARD}"))}


def merged_hash(base: str | None, adapter: Mapping[str, Tensor]) -> str:
    """The identity of weights with an adapter: of the base's hash and the adapter's values."""
    return hashlib.sha256(f"{base} {hash_of(adapter, trained=True)}".encode()).hexdigest()
