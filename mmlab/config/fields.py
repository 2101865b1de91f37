"""Fields of the settings dataclasses: choices, bounds and sections, and the check of values against them."""

import operator
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from mmlab.config.errors import ConfigError, nearest

BOUNDS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le, "below": operator.lt}


class Settings:
    """Base of all settings dataclasses: values are checked against choices and bounds when one is made in Python.

    A dataclass `XConfig` in `mmlab/<folder>/config.py` describes the class `X` that its `_target_` names, which takes
    it as its first argument. Option files refer to it as `/schema/XConfig@_here_`.

    Raises:
        ConfigError: a value outside of its field's choices or bounds.
    """

    def __post_init__(self) -> None:
        for rules in fields(self):  # type: ignore[arg-type]
            value = getattr(self, rules.name)
            if value is not None and value != MISSING and "group" not in rules.metadata:
                check_value(rules.name, value, rules.metadata)


def choice(*options: str, default: Any = NO_DEFAULT) -> Any:
    """A string field that takes one of `options`; the first is the default unless another one is given."""
    return field(default=options[0] if default is NO_DEFAULT else default, metadata={"choices": options})


def number(
    default: Any,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A number field with bounds (None passes)."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    return field(default=default, metadata=bounds)


def section(group: str | None = None, default: Any = MISSING) -> Any:
    """A part with settings of its own, which is built and passed to the class beside its settings.

    Args:
        group: the config group whose options fill it; None where there is no group.
        default: None for an optional part, or the dataclass of the part that is taken unless another is chosen.
    """
    factory = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return field(**factory, metadata={"group": group})  # type: ignore[call-overload]


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


def check_value(where: str, value: Any, rules: Any) -> None:
    """Compare a value with the choices and bounds of its field.

    Args:
        where: the key, for the message.
        value: None passes.
        rules: the field's metadata.

    Raises:
        ConfigError: the value is outside of them.
    """
    if value is None:
        return
    if "group" in rules and not isinstance(value, DictConfig):
        group = rules["group"]
        advice = f"is a config group; choose its option with {group}={value}" if group else "is a section"
        raise ConfigError(f"'{where}' {advice}.")
    if "choices" in rules and value not in rules["choices"]:
        options = ", ".join(rules["choices"])
        raise ConfigError(f"'{where}' cannot be '{value}'.{nearest(str(value), rules['choices'])} Options: {options}.")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, holds in BOUNDS.items():
            if rules.get(name) is not None and not holds(value, rules[name]):
                raise ConfigError(f"'{where}' must be {name.replace('_', ' ')} {rules[name]}, not {value}.")


def _check_node(node: DictConfig | ListConfig, path: str, extra: set[str]) -> None:
    rules = schema_fields(node)
    for key, value in _values(node, path, extra):
        where = f"{path}.{key}".lstrip(".")
        if rules:
            if key not in rules:
                raise ConfigError(unknown_key(where, list(rules)))
            check_value(where, value, rules[str(key)].metadata)
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
        except InterpolationToMissingValueError:  # the check for missing values names it
            continue
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            where = f"{path}.{key}".lstrip(".")
            raise ConfigError(f"'{where}' cannot be resolved: {reason}.") from error
