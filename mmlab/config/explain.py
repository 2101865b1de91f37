"""Exceptions of Hydra and OmegaConf as one sentence, with the closest valid name."""

import inspect
import re
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError

from mmlab.config.build import locate
from mmlab.config.errors import ConfigError, closest, nearest
from mmlab.config.fields import unknown_key
from mmlab.config.schemas import schema_of, schemas

T = TypeVar("T", bound=BaseException)

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError, ValueError)
TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "true or false", "Boolean": "true or false"}
# Beginning of a message → our sentence, with the groups of the match.
HYDRA_MESSAGES = {
    r"Ambiguous value for argument '(([^=]*)=(.*))'": (
        "'{0}' is a sweep: add -m to run each value, or write {1}=[{2}] for a list."
    ),
    r"Sweep parameters '(.*)' requires": "'{0}' is a sweep: add -m.",
    r"Could not append to config. An item is already at '(.*)'": "'{0}' exists already; give it without the +.",
    r"Could not delete from config. '(.*)' does not exist": "There is no key '{0}' to delete.",
}
VALUE_MESSAGES = {
    r".*is not Optional": "'{key}' cannot be null.",
    r".*is not a ListConfig": "'{key}' takes a list, as in {key}=[a,b].",
    r".*(is not a subclass|Cannot assign|Cannot merge)": "'{key}' is a section with its own keys; give {key}.<key>=….",
}
# Option of hydra/launcher or hydra/sweeper → the name under which mmlab offers it.
PLUGINS = {"sampler": "optuna", "joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "submitit_local"}


def explain(error: Exception, loader: ConfigLoader, config_name: str | None, overrides: list[str]) -> ConfigError:
    """Return the error for an exception raised while composing `overrides` onto `config_name`."""
    if isinstance(error, OverrideParseException):
        return ConfigError(_invalid_override(error))
    # First the names: Hydra reports a misspelled group (`modle=llava`) as "You must specify 'model'".
    return ConfigError(
        _unknown_name(loader, config_name, overrides)
        or _missing_option(error, loader)
        or _invalid_key(error, loader)
        or _invalid_yaml(error)
        or _hydra_message(error, loader)
    )


def groups_of(loader: ConfigLoader, parent: str = "") -> list[str]:
    """Return all config groups, nested ones as `model/vision`, without the schemas and Hydra's own."""
    groups: list[str] = []
    for name in loader.get_group_options(parent, ObjectType.GROUP):
        if parent or name not in ("schema", "hydra"):
            group = f"{parent}/{name}".lstrip("/")
            groups += [group, *groups_of(loader, group)]
    return groups


def root_schema(loader: ConfigLoader, config_name: str | None) -> type | None:
    """Return the dataclass that a root config names first in its defaults list."""
    result = loader.repository.load_config(config_name) if config_name else None  # type: ignore[attr-defined]
    paths = [getattr(default, "path", None) or "" for default in (result.defaults_list or [])] if result else []
    names = [path.removeprefix("/schema/") for path in paths if path.startswith("/schema/")]
    if names:
        return schemas().get(names[0])
    return root_schema(loader, paths[0]) if paths and paths[0] else None


def no_choice(group: str, loader: ConfigLoader) -> str:
    """Return the sentence for a config group without a chosen option."""
    options = ", ".join(loader.get_group_options(group)) or "none yet"
    return f"No {group} is chosen; give {group}=<option> ({options}) or a recipe with experiment=<name>."


def explain_key(error: OmegaConfBaseException, groups: list[str] | tuple[str, ...] = ()) -> str:
    """Return the sentence for a key or value that a config does not accept."""
    key = str(error.full_key or error.key or "")
    message = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        kind = error.object_type
        options = [field.name for field in fields(kind)] if kind is not None and is_dataclass(kind) else []
        group = key.replace(".", "/")
        hint = f" Config groups take a slash: {group}=…" if group in groups else ""
        return unknown_key(key, options) + hint if options else _unknown_open_key(key, error.parent_node)
    if isinstance(error, ValidationError):
        wrong = re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", message)
        if wrong:
            return f"'{key}' takes {TYPES.get(wrong[2], wrong[2])}, not '{wrong[1]}'."
        if not key and "is not a subclass" in message:
            return "two options of one config group cannot be combined; choose one."
        if sentence := _translate(message, VALUE_MESSAGES, key=key):
            return sentence
    return (f"'{key}': " if key and key not in message else "") + message + "."


def _invalid_override(error: OverrideParseException) -> str:
    if "=" not in error.override:
        return f"'{error.override}' is not of the form key=value."
    reason = error.message.splitlines()[-2 if "\nSee " in error.message else -1]
    return f"'{error.override}' cannot be read as key=value: {reason} (put quotes around special characters)."


def _unknown_name(loader: ConfigLoader, config_name: str | None, overrides: list[str]) -> str | None:
    """The first override with an unknown key, group or option."""
    root = root_schema(loader, config_name)
    if root is None:
        return None
    groups, keys = groups_of(loader), [field.name for field in fields(root)]
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key.startswith(("hydra.", "hydra/")) or override.is_add() or override.is_force_add():
            continue
        if "/" in key and key not in groups:
            return f"There is no config group '{key}'.{nearest(key, groups)}"
        if "/" not in key and (word := key.split(".")[0]) not in {*groups, *keys}:
            hint = nearest(word, [*groups, *keys]) or f" Keys: {', '.join(keys)}."
            return f"There is no key or config group '{word}'.{hint}"
        if key in groups and not override.is_sweep_override() and not override.is_delete():
            value, options = override.value(), loader.get_group_options(key)
            if value is None:
                return f"Config group '{key}' takes the name of an option; leave it out to choose none."
            if isinstance(value, str) and value not in options:
                return _unknown_option(key, value, options)
            if not isinstance(value, str | list):
                return f"Config group '{key}' takes the name of an option, not {value}."
    return None


def _unknown_option(group: str, name: str, options: list[str], source: str = "") -> str:
    folder = name.rpartition("/")[0]
    shown = [option for option in options if folder and option.startswith(f"{folder}/")] or options
    listed = f" Options: {', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}." if shown else ""
    return f"Config group '{group}' has no option '{name}'{source}.{nearest(name, options)}{listed}"


def _missing_option(error: Exception, loader: ConfigLoader) -> str | None:
    """A config file that does not exist."""
    if not isinstance(error, MissingConfigException):
        return None
    missing = error.missing_cfg_file or ""
    if plugin := re.match(r"(hydra/(?:launcher|sweeper))/(.+)", missing):
        return _missing_plugin(plugin[1], plugin[2], loader)
    parents = [group for group in [*groups_of(loader), "schema"] if missing.startswith(f"{group}/")]
    if not parents:
        return str(error).splitlines()[0].replace("primary config", "config") + "."
    group = max(parents, key=len) if error.options else min(parents, key=len)
    source = f" (chosen in {_file_of(error)})" if "/" in _file_of(error) else ""
    return _unknown_option(group, missing.removeprefix(f"{group}/"), loader.get_group_options(group), source)


def _missing_plugin(group: str, name: str, loader: ConfigLoader) -> str:
    """A launcher or sweeper that is not installed, or does not exist."""
    plugin = PLUGINS.get(name.partition("/")[0])
    folder, _, name = f"{group}/{name}".rpartition("/")
    options = loader.get_group_options(folder)
    if plugin and (plugin != "optuna" or not options):
        return f"{group}={plugin} needs a plugin of Hydra: pip install 'mmlab[sweep]'"
    return _unknown_option(folder, name, options)


def _invalid_key(error: Exception, loader: ConfigLoader) -> str | None:
    cause = _cause(error, OmegaConfBaseException)
    if cause is None:
        return None
    place = f"In {_file_of(error)}: " if _file_of(error) else ""
    return place + explain_key(cause, groups_of(loader))


def _unknown_open_key(key: str, node: Any) -> str:
    """The sentence for a key of a section without a dataclass; suggests its keys and the arguments of its class."""
    if not isinstance(node, DictConfig) or node._is_none():
        return f"There is no key '{key}'."
    if not node:
        return f"There is no key '{key}' yet; add it with +{key}…"
    keys = list(map(str, node))
    addable = [name for name in _settings_of(node.get("_target_")) if name not in keys]
    section, _, word = key.rpartition(".")
    if (close := closest(word, [*keys, *addable])) in addable:
        return f"There is no key '{key}'. Did you mean '+{section}.{close}=…'?"
    return unknown_key(key, [*keys, *addable])


def _settings_of(target: Any) -> list[str]:
    """The fields of a class's dataclass, or else its arguments."""
    if (kind := schema_of(target)) is not None:
        return [field.name for field in fields(kind) if not field.name.startswith("_")]
    with suppress(ConfigError, ImportError):  # a class that cannot be imported is reported when it is built
        return list(inspect.signature(locate(target)).parameters)
    return []


def _invalid_yaml(error: Exception) -> str | None:
    cause = _cause(error, MarkedYAMLError)
    if cause is None:
        return None
    mark = cause.problem_mark or cause.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark else "A config file"
    return f"{place} is not valid YAML: {cause.problem}."


def _hydra_message(error: Exception, loader: ConfigLoader) -> str:
    first = (str(error).splitlines() or ["The config cannot be composed"])[0].rstrip(".")
    if group := re.match(r"You must specify '([^']+)'", first):
        return no_choice(group[1], loader)
    return _translate(first, HYDRA_MESSAGES) or f"{first}."


def _translate(message: str, sentences: dict[str, str], **values: str) -> str | None:
    """The sentence of the first pattern that `message` matches."""
    for pattern, sentence in sentences.items():
        if match := re.match(pattern, message):
            return sentence.format(*match.groups(), **values)
    return None


def _file_of(error: Exception) -> str:
    """The config file that a message of Hydra begins with, or an empty string."""
    file = re.match(r"In '([^']+)'", str(error))
    return file[1] if file else ""


def _cause(error: BaseException | None, kind: type[T]) -> T | None:
    """The first exception of `kind` among `error` and its causes."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None
