"""What a run leaves behind: one folder per trained part, with a card; the next stage starts from it."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmlab.config.errors import ConfigError
from mmlab.training.trainable import parts_of

CARD = "card.json"
WEIGHTS = "model.safetensors"


@runtime_checkable
class SavesItself(Protocol):
    """A part that is written as a folder of its own format (a transformers folder)."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def describe(self) -> dict[str, Any]: ...


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's weights: names, shapes and 1,024 values spread over each tensor, as fp32.

    Sampling keeps it to a fraction of a second at 7 billion parameters; it tells checkpoints apart, it is
    no proof against tampering. It does not change when a part is cast to bf16 and was stored in bf16.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        # An odd step, or a matrix of even width would be sampled in a few columns only.
        step = max(1, flat.numel() // 1024) | 1
        digest.update(flat[::step].to(torch.bfloat16).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(module: nn.Module) -> dict[str, Any]:
    """What a part that was trained beside `module` depends on."""
    extra = module.describe() if isinstance(module, SavesItself) else {}
    return {"fingerprint": fingerprint(module), **extra}


def save_parts(model: nn.Module, trained: Sequence[str], folder: Path, card: dict[str, Any]) -> list[Path]:
    """Write `folder/<part>/` for every trained part: weights, config, card.

    Args:
        model: its direct children are the parts.
        trained: names of the parts that learned, or dotted names inside a part, which is then written whole; the
            other parts are described in the card, not copied.
        folder: usually `runs/<name>/artifacts`.
        card: facts about the run (name, stage, prompt).

    Returns:
        The folders written.
    """
    parts = parts_of(model)
    learned = list(dict.fromkeys(name.split(".")[0] for name in trained))
    against = {name: describe(part) for name, part in parts.items() if name not in learned}
    written = []
    for name in learned:
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


def load_parts(model: nn.Module, runs: Iterable[Path]) -> dict[str, Path]:
    """Fill the model's parts from the artifacts of earlier runs; a later run wins.

    Args:
        model: its direct children are the parts.
        runs: run folders that hold `artifacts/<part>/`.

    Returns:
        The folder that each loaded part came from.

    Raises:
        ConfigError: a run without a fitting part, other shapes, or a part trained beside other frozen parts.
    """
    parts = parts_of(model)
    sources: dict[str, Path] = {}
    for run in runs:
        found = {path.parent.name: path.parent for path in sorted(Path(run).glob(f"artifacts/*/{CARD}"))}
        fitting = {name: path for name, path in found.items() if name in parts}
        if not fitting:
            has = f"it has {', '.join(found)}" if found else "it has none: did it finish?"
            raise ConfigError(f"{run} holds no artifact for {', '.join(parts)}; {has}.")
        sources.update(fitting)
    for name, path in sources.items():
        _load(parts[name], path)
    for name, path in sources.items():
        _refuse_strangers(name, path, parts)
    return sources


def fingerprints(folder: Path) -> dict[str, str]:
    """Part → fingerprint of its weights, of all parts that a run trained or trained beside, without loading them."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob(f"artifacts/*/{CARD}")):
        card = json.loads(path.read_text())
        found |= {name: other["fingerprint"] for name, other in card["against"].items()}
        found[card["part"]] = card["fingerprint"]
    return found


def _load(part: nn.Module, path: Path) -> None:
    if isinstance(part, SavesItself):
        part.load(path)
        return
    if not (path / WEIGHTS).is_file():
        raise ConfigError(f"{path} does not fit the model: it holds no {WEIGHTS}, so it is no {type(part).__name__}.")
    weights, wanted = load_file(path / WEIGHTS), part.state_dict()
    for key in sorted(weights.keys() | wanted.keys()):
        stored = list(weights[key].shape) if key in weights else "nothing"
        needed = list(wanted[key].shape) if key in wanted else "nothing"
        if stored != needed:
            raise ConfigError(f"{path} does not fit the model: {key} is {stored} there and {needed} here.")
    part.load_state_dict(weights)


def _refuse_strangers(name: str, path: Path, parts: dict[str, nn.Module]) -> None:
    """A connector learned beside one vision encoder means nothing beside another."""
    against = json.loads((path / CARD).read_text()).get("against", {})
    for other, expected in against.items():
        if other not in parts:
            continue
        actual = describe(parts[other])
        for field, value in expected.items():
            if actual.get(field) != value:
                raise ConfigError(
                    f"{path} was trained beside another {other}: its {field} was {value}, here it is "
                    f"{actual.get(field)}. Load the same {other}, or train {name} again."
                )
