"""Fields of the settings dataclasses: their choices and bounds, and the check of a composed config against them."""

import operator
from collections.abc import Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from mmlab.config.errors import ConfigError, nearest


def choice(*options: str) -> Any:
    """A string field that takes one of `options`; the first is the default."""
    return field(default=options[0], metadata={"choices": options})


def number(
    default: Any, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Any:
    """A number field with bounds, checked right after composition (None passes)."""
    return field(default=default, metadata={"above": above, "at_least": at_least, "at_most": at_most})


def section(group: str) -> Any:
    """A node that an option of `group` fills, and types."""
    return field(default=MISSING, metadata={"group": group})


def for_verb(given: Any) -> Any:
    """A field (or a plain default) that the verb reads: `build` does not pass it to the node's class."""
    rules = dict(given.metadata) if isinstance(given, Field) else {}
    default = given.default if isinstance(given, Field) else given
    return field(default=default, metadata={**rules, "verb": True})


BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


def unknown_key(path: str, options: list[str]) -> str:
    """One sentence about the key `path`, whose last word is not among `options`."""
    options = sorted(option for option in options if not option.startswith("_"))
    hint = nearest(path.rpartition(".")[2], options) or f" Keys there: {', '.join(options)}."
    return f"There is no key '{path}'.{hint}"


def check_fields(cfg: DictConfig) -> None:
    """Compare every node with the dataclass that it was merged into.

    Raises:
        ConfigError: an unknown key (`+typo=1` too), a value outside its options or bounds, a group's node
            that holds no section, or an interpolation that leads nowhere.
    """
    _check_node(cfg, "", {"hydra"})


def missing_values(cfg: DictConfig) -> list[str]:
    """Return the keys that still hold `???`, outside Hydra's own."""
    keys = [key for key in OmegaConf.missing_keys(cfg) if key.split(".")[0] != "hydra"]
    return sorted(keys, key=lambda key: (key.count("."), key))


def schema_fields(node: Any) -> dict[str, Field]:
    """Return the fields of the dataclass behind `node`, none when it has no schema."""
    kind = OmegaConf.get_type(node) if OmegaConf.is_config(node) else None
    return {f.name: f for f in fields(kind)} if kind is not None and is_dataclass(kind) else {}


def _check_node(node: DictConfig | ListConfig, path: str, extra: set[str]) -> None:
    known = schema_fields(node)
    for key, value in _values(node, path, extra):
        where = f"{path}.{key}".lstrip(".")
        if known:
            if key not in known:
                raise ConfigError(unknown_key(where, list(known)))
            _check_value(where, value, known[str(key)].metadata)
        if isinstance(value, DictConfig | ListConfig):
            _check_node(value, where, set())


def _values(node: Any, path: str, extra: set[str]) -> Iterator[tuple[Any, Any]]:
    """Yield keys and values that are neither missing nor left for Hydra to resolve at run time."""
    if node._is_none() or node._is_missing():
        return
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node.keys()):
        if key in extra:
            continue
        if OmegaConf.is_missing(node, key):
            yield key, None
            continue
        raw = node._get_node(key)
        if OmegaConf.is_interpolation(node, key) and "${hydra:" in str(raw._value()):  # type: ignore[union-attr]
            continue
        try:
            yield key, node[key]
        except InterpolationToMissingValueError:  # whoever asks for values names the missing one
            continue
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            where = f"{path}.{key}".lstrip(".")
            raise ConfigError(f"'{where}' cannot be resolved: {reason}.") from error


def _check_value(where: str, value: Any, rules: Any) -> None:
    if value is None:
        return
    if "group" in rules and not isinstance(value, DictConfig):
        group = rules["group"]
        raise ConfigError(f"'{where}' is a config group; choose its option with {group}={value}.")
    if "choices" in rules and value not in rules["choices"]:
        options = ", ".join(rules["choices"])
        raise ConfigError(f"'{where}' cannot be '{value}'.{nearest(str(value), rules['choices'])} Options: {options}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, holds in BOUNDS.items():
            if rules.get(name) is not None and not holds(value, rules[name]):
                raise ConfigError(f"'{where}' must be {name.replace('_', ' ')} {rules[name]}, not {value}.")
