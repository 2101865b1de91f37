"""Fields of the settings dataclasses: choices, bounds and sections, and checks of values against them."""

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
    """Base of all settings dataclasses; constructing one checks its values against their choices and bounds.

    A dataclass `XConfig` in `mmlab/<folder>/config.py` holds the settings of the class `X` in its `_target_`, which
    takes it as its first argument. Option files refer to it as `/schema/XConfig@_here_`.

    Raises:
        ConfigError: a value outside its field's choices or bounds.
    """

    def __post_init__(self) -> None:
        for rules in fields(self):  # type: ignore[arg-type]
            value = getattr(self, rules.name)
            if value is not None and value != MISSING and "group" not in rules.metadata:
                check_value(rules.name, value, rules.metadata)


def choice(*options: str, default: Any = NO_DEFAULT) -> Any:
    """A string field that takes one of `options`, by default the first."""
    return field(default=options[0] if default is NO_DEFAULT else default, metadata={"choices": options})


def number(
    default: Any,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A number field with bounds; None is always valid."""
    bounds = {"above": above, "at_least": at_least, "at_most": at_most, "below": below}
    return field(default=default, metadata=bounds)


def section(group: str | None = None, default: Any = MISSING) -> Any:
    """A part with its own settings: it is built first and passed to the class by name.

    Args:
        group: the config group with the options for the part; None if it has no group.
        default: None for an optional part, or the dataclass of the default part; by default a choice is required.
    """
    factory = {"default_factory": default} if isinstance(default, type) else {"default": default}
    metadata = {"group": group, "required": default is not None}
    return field(**factory, metadata=metadata)  # type: ignore[call-overload]


def entries(kind: type) -> Any:
    """A mapping from names to sections with the keys of the dataclass `kind`, empty by default."""
    return field(default_factory=dict, metadata={"entries": kind})


def unknown_key(path: str, options: list[str]) -> str:
    """Return the error for the key `path`, whose last word is not among `options`."""
    options = sorted(option for option in options if not option.startswith("_"))
    listed = f" Keys there: {', '.join(options)}." if options else " The section has no keys."
    hint = nearest(path.rpartition(".")[2], options) or listed
    return f"There is no key '{path}'.{hint}"


def check_fields(cfg: DictConfig) -> None:
    """Check every node against its dataclass.

    Raises:
        ConfigError: an unknown key (including `+typo=1`), a value outside its choices or bounds, a plain value in
            place of a section, or an interpolation that cannot be resolved.
    """
    _check_node(cfg, "", {"hydra"})


def missing_values(cfg: DictConfig) -> list[str]:
    """Return the keys with the value `???`, except Hydra's own, outermost first."""
    keys = [key for key in OmegaConf.missing_keys(cfg) if key.split(".")[0] != "hydra"]
    return sorted(keys, key=lambda key: (key.count("."), key))


def schema_fields(node: Any) -> dict[str, Field]:
    """Return the fields of the dataclass of `node` by name; empty if it has none."""
    kind = OmegaConf.get_type(node) if OmegaConf.is_config(node) else None
    return {f.name: f for f in fields(kind)} if kind is not None and is_dataclass(kind) else {}


def check_value(where: str, value: Any, rules: Any) -> None:
    """Check a value against the choices and bounds of its field.

    Args:
        where: the key, for the error.
        value: None is always valid.
        rules: the field's metadata.

    Raises:
        ConfigError: the value is not valid.
    """
    if value is None:
        return
    if "group" in rules and not isinstance(value, DictConfig):
        group = rules["group"]
        advice = f"is a config group; choose its option with {group}={value}" if group else "is a section"
        raise ConfigError(f"'{where}' {advice}.")
    for name, entry in value.items() if "entries" in rules else ():
        if not OmegaConf.is_dict(entry) and not is_dataclass(entry):
            raise ConfigError(f"'{where}.{name}' is a section with its own keys; give +{where}.{name}.<key>=….")
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
            if value is None and rules[str(key)].metadata.get("required") and not OmegaConf.is_missing(node, key):
                group = rules[str(key)].metadata["group"]
                raise ConfigError(f"'{where}' cannot be null{f'; choose {group}=<option>' if group else ''}.")
        if isinstance(value, DictConfig | ListConfig):
            _check_node(value, where, set())


def _values(node: Any, path: str, extra: set[str]) -> Iterator[tuple[Any, Any]]:
    """Yield keys and resolved values (None if missing), without those that only Hydra can resolve, at run time."""
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
        except InterpolationToMissingValueError:  # reported by the check for missing values
            continue
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            where = f"{path}.{key}".lstrip(".")
            raise ConfigError(f"'{where}' cannot be resolved: {reason}.") from error
