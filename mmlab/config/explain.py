"""Hydra's and OmegaConf's exceptions as one sentence with the nearest right name."""

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
from mmlab.config.schemas import schemas

T = TypeVar("T", bound=BaseException)

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, MarkedYAMLError, ValueError)
KINDS = {
    "Integer": "a whole number",
    "Float": "a number",
    "bool": "true or false",
    "Boolean": "true or false",
}


def explain(error: Exception, loader: ConfigLoader, config_name: str | None, overrides: list[str]) -> ConfigError:
    """Return the sentence for what went wrong while `overrides` were composed onto `config_name`."""
    if isinstance(error, OverrideParseException):
        return ConfigError(_syntax(error))
    # A misspelt group (`modle=llava`) first shows as "You must specify 'model'": look at the names before.
    sentence = _unknown_name(loader, config_name, overrides)
    if sentence is None and isinstance(error, MissingConfigException):
        sentence = _missing_option(error, loader)
    cause = _chained(error, OmegaConfBaseException)
    if sentence is None and cause is not None:
        file = re.match(r"In '([^']+)'", str(error))
        sentence = (f"In {file[1]}: " if file else "") + explain_key(cause, groups_of(loader))
    if sentence is None and (yaml := _chained(error, MarkedYAMLError)):
        mark = yaml.problem_mark or yaml.context_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "A config file"
        sentence = f"{place} is not valid YAML: {yaml.problem}."
    return ConfigError(sentence or _hydra(str(error), loader))


def groups_of(loader: ConfigLoader, parent: str = "") -> list[str]:
    """Return every config group, nested ones as `model/vision`; schemas and Hydra's own left out."""
    groups: list[str] = []
    for name in loader.get_group_options(parent, ObjectType.GROUP):
        if parent or name not in ("schema", "hydra"):
            group = f"{parent}/{name}".lstrip("/")
            groups += [group, *groups_of(loader, group)]
    return groups


def _syntax(error: OverrideParseException) -> str:
    if "=" not in error.override:
        return f"'{error.override}' is not of the form key=value."
    reason = error.message.splitlines()[-2 if "\nSee " in error.message else -1]
    return f"'{error.override}' cannot be read as key=value: {reason} (put quotes around special characters)."


def _unknown_name(loader: ConfigLoader, config_name: str | None, overrides: list[str]) -> str | None:
    """The first override that names neither a group and its option nor a key of the root."""
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
                return _no_option(key, value, options)
            if not isinstance(value, str | list):
                return f"Config group '{key}' takes the name of an option, not {value}."
    return None


def root_schema(loader: ConfigLoader, config_name: str | None) -> type | None:
    """The dataclass that a root config names first in its defaults list."""
    result = loader.repository.load_config(config_name) if config_name else None  # type: ignore[attr-defined]
    paths = [getattr(default, "path", None) or "" for default in (result.defaults_list or [])] if result else []
    names = [path.removeprefix("/schema/") for path in paths if path.startswith("/schema/")]
    if names:
        return schemas().get(names[0])
    return root_schema(loader, paths[0]) if paths and paths[0] else None


def _no_option(group: str, name: str, options: list[str], source: str = "") -> str:
    folder = name.rpartition("/")[0]
    shown = [option for option in options if folder and option.startswith(f"{folder}/")] or options
    listed = f" Options: {', '.join(shown[:12])}{', …' if len(shown) > 12 else ''}." if shown else ""
    return f"Config group '{group}' has no option '{name}'{source}.{nearest(name, options)}{listed}"


def _missing_option(error: MissingConfigException, loader: ConfigLoader) -> str:
    missing = error.missing_cfg_file or ""
    if found := re.match(r"(hydra/(launcher|sweeper))/(.+)", missing):
        return _missing_plugin(found[1], found[3], loader)
    parents = [group for group in [*groups_of(loader), "schema"] if missing.startswith(f"{group}/")]
    if not parents:
        return str(error).splitlines()[0].replace("primary config", "config") + "."
    group = max(parents, key=len) if error.options else min(parents, key=len)
    name = missing.removeprefix(f"{group}/")
    options = loader.get_group_options(group)
    file = re.match(r"In '([^']+)'", str(error))
    source = f" (asked for in {file[1]})" if file and "/" in file[1] else ""
    return _no_option(group, name, options, source)


def _missing_plugin(group: str, name: str, loader: ConfigLoader) -> str:
    """A launcher or a sweeper that is an extra, or that there is not at all."""
    plugins = {"sampler": "optuna", "joblib": "joblib", "submitit_slurm": "slurm", "submitit_local": "submitit_local"}
    what = plugins.get(name.partition("/")[0])
    folder, _, name = f"{group}/{name}".rpartition("/")
    options = loader.get_group_options(folder)
    if what and (what != "optuna" or not options):
        return f"{group}={what} needs a plugin of Hydra: pip install 'mmlab[sweep]'"
    return _no_option(folder, name, options)


def explain_key(error: OmegaConfBaseException, groups: list[str] | tuple[str, ...] = ()) -> str:
    """Return the sentence for a key or a value that its dataclass does not take."""
    key = str(error.full_key or error.key or "")
    message = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        kind = error.object_type
        options = [field.name for field in fields(kind)] if kind is not None and is_dataclass(kind) else []
        group = key.replace(".", "/")
        hint = f" Config groups take a slash: {group}=…" if group in groups else ""
        return unknown_key(key, options) + hint if options else _unknown_open_key(key, error.parent_node)
    if isinstance(error, ValidationError):
        if found := re.match(r"Value '(.*)' (?:of type '.*' could not be converted to|is not a valid) (\w+)", message):
            return f"'{key}' takes {KINDS.get(found[2], found[2])}, not '{found[1]}'."
        if "is not Optional" in message:
            return f"'{key}' cannot be null."
        if "is not a ListConfig" in message:
            return f"'{key}' takes a list, as in {key}=[a,b]."
        if "is not a subclass" in message or "Cannot assign" in message or "Cannot merge" in message:
            return f"'{key}' is a section with keys of its own; give {key}.<key>=…."
    return (f"'{key}': " if key and key not in message else "") + message + "."


def _unknown_open_key(key: str, node: Any) -> str:
    """The sentence for a key of a section without a dataclass: what stands there, and what its class takes too."""
    if not isinstance(node, DictConfig) or node._is_none() or not node:
        return f"There is no key '{key}'."
    there, more = list(map(str, node)), []
    if node.get("_target_"):
        # A class that cannot be loaded is the business of whoever builds it.
        with suppress(ConfigError, ImportError):
            more = [name for name in inspect.signature(locate(node._target_)).parameters if name not in there]
    section, _, word = key.rpartition(".")
    if (close := closest(word, [*there, *more])) in more:
        return f"There is no key '{key}'. Did you mean '+{section}.{close}=…'?"
    return unknown_key(key, [*there, *more])


def _hydra(message: str, loader: ConfigLoader) -> str:
    first = message.splitlines()[0].rstrip(".") if message else "The config cannot be composed"
    if found := re.match(r"You must specify '([^']+)'", first):
        return no_choice(found[1], loader)
    if found := re.match(r"Ambiguous value for argument '(.*)'", first):
        key, _, values = found[1].partition("=")
        return f"'{found[1]}' is a sweep: add -m to run each value, or write {key}=[{values}] for a list."
    if found := re.match(r"Sweep parameters '(.*)' requires", first):
        return f"'{found[1]}' is a sweep: add -m."
    if found := re.match(r"Could not append to config. An item is already at '(.*)'", first):
        return f"'{found[1]}' exists already; give it without the +."
    if found := re.match(r"Could not delete from config. '(.*)' does not exist", first):
        return f"There is no key '{found[1]}' to delete."
    return f"{first}."


def no_choice(group: str, loader: ConfigLoader) -> str:
    """One sentence about a group from which nothing was chosen."""
    options = ", ".join(loader.get_group_options(group)) or "none yet"
    return f"No {group} is chosen; give {group}=<option> ({options}) or a recipe with experiment=<name>."


def _chained(error: BaseException | None, kind: type[T]) -> T | None:
    """The first exception of `kind` among `error` and what led to it."""
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None
