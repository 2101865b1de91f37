"""The settings dataclasses of all folders, by name and by the class that they configure.

They are collected from each folder's `config.py`, which never imports torch: a new dataclass there needs no further
registration.
"""

import importlib
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mmlab.config.fields import schema_fields

FOLDERS = Path(__file__).parents[1]


@cache
def schemas() -> dict[str, type]:
    """Return all settings dataclasses by name, such as AdamWConfig."""
    classes: dict[str, type] = {}
    for file in sorted(FOLDERS.glob("*/config.py")):
        module = importlib.import_module(f"mmlab.{file.parent.name}.config")
        own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
        classes |= {kind.__name__: kind for kind in own if is_dataclass(kind)}
    return classes


@cache
def _by_target() -> dict[str, type]:
    targets = {name: getattr(kind, "_target_", None) for name, kind in schemas().items()}
    return {target: schemas()[name] for name, target in targets.items() if isinstance(target, str) and target != "???"}


def schema_of(target: Any) -> type | None:
    """Return the dataclass of the class `target`, None if it has none."""
    return _by_target().get(target)


def targets() -> list[str]:
    """Return the classes that have a settings dataclass, as dotted names."""
    return list(_by_target())


@cache
def register() -> None:
    """Register the dataclasses in Hydra's ConfigStore as `/schema/<name>`, once per process."""
    store = ConfigStore.instance()
    for name, kind in schemas().items():
        store.store(name=name, group="schema", node=kind)
    # Hydra copies its sources for each composition, and all schemas with them, which is an eighth of its time.
    vars(store)["__deepcopy__"] = lambda memo: store


def attach(node: DictConfig, where: str = "", entries: type | None = None) -> None:
    """Merge, in place, every part below `node` with a `_target_` of ours into the dataclass of that class.

    Args:
        node: the config.
        where: its key.
        entries: the dataclass of all sections in `node`, if the field has one.

    Raises:
        OmegaConfBaseException: a key or value that the dataclass does not accept; its `full_key` begins with `where`.
    """
    for key in list(node):
        part, at = node._get_node(key), f"{where}.{key}".lstrip(".")
        if not isinstance(part, DictConfig) or part._is_none() or part._is_missing() or part._is_interpolation():
            continue
        kind = schema_of(part._get_node("_target_")._value()) if "_target_" in part else entries  # type: ignore[union-attr]
        if kind is not None and OmegaConf.get_type(part) is dict:
            try:
                with open_dict(node):
                    node[key] = OmegaConf.merge(OmegaConf.structured(kind), part)
            except OmegaConfBaseException as error:
                error.full_key = f"{at}.{error.full_key or error.key}"
                raise
        rules = schema_fields(node).get(str(key))
        attach(node[key], at, rules.metadata.get("entries") if rules is not None else None)
