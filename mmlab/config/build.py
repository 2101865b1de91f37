"""From a config to objects: which classes a config may name, and how they receive their settings.

A class of ours takes its settings dataclass as its first argument, then its parts by name, which are built first. A
class from the user's own package takes the keys of its YAML as keyword arguments, through `hydra.utils.instantiate`.

People exchange configs, and `_target_: os.system` would run a command. A target is therefore checked by name before
anything is imported: allowed are classes with a settings dataclass in mmlab, a few classes of Lightning, and packages
that the user allows: `MMLAB_ALLOW_TARGETS=mylab,other.package`.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.config.fields import unknown_key
from mmlab.config.schemas import schema_of, targets

VETTED = (
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.loggers.WandbLogger",
)
VARIABLE = "MMLAB_ALLOW_TARGETS"


def build(node: Any, **parts: Any) -> Any:
    """Build the object that `node` describes, after its parts.

    Args:
        node: a settings dataclass or a mapping with `_target_`, or the config node of either.
        **parts: parts that are built already; they replace those in `node`.

    Returns:
        The object; a partial of its class with `_partial_: true`; None if `_target_` is null.

    Raises:
        ConfigError: a target that is not allowed or does not exist, an argument that its class does not take, or an
            error from the class about its settings.
    """
    if isinstance(node, DictConfig | Mapping):
        node = _settings(node, parts)
    target = node.get("_target_") if isinstance(node, Mapping) else node._target_
    if target is None:
        return None
    if is_dataclass(node) and target.startswith("mmlab."):
        return _build_own(node, target, parts)
    plain = node if isinstance(node, Mapping) else {f.name: getattr(node, f.name) for f in fields(node)}
    return _build_foreign(dict(plain), target, parts)


def _settings(node: Any, parts: Mapping[str, Any]) -> Any:
    """The checked settings of `node`: the dataclass of its class, or a dict if the class has none."""
    check_targets(node)
    kind = schema_of(node.get("_target_"))
    if kind is None:
        return OmegaConf.to_object(node) if isinstance(node, DictConfig) else node
    if not isinstance(node, DictConfig) or OmegaConf.get_type(node) is dict:
        node = OmegaConf.merge(OmegaConf.structured(kind), node)
    for name in parts.keys() & set(node):
        node = OmegaConf.merge(node, {name: None})  # built already, so `node` may lack it
    return OmegaConf.to_object(node)


def _build_own(config: Any, target: str, parts: dict[str, Any]) -> Any:
    """Call a class of ours: `X(config, **parts)`; without settings of its own, `X(**parts)`."""
    sections = [field.name for field in fields(config) if "group" in field.metadata]
    for name in sections:
        if name not in parts:
            value = getattr(config, name)
            parts[name] = None if value is None else build(value)
    factory = locate(target)
    if has_settings(type(config)):
        factory = functools.partial(factory, config)
    if getattr(config, "_partial_", False):
        return functools.partial(factory, **parts)
    return factory(**parts)


def has_settings(kind: type) -> bool:
    """Whether a dataclass has fields besides its target and its parts; otherwise it is not passed to its class."""
    return any(not field.name.startswith("_") and "group" not in field.metadata for field in fields(kind))


def _build_foreign(arguments: dict[str, Any], target: str, parts: dict[str, Any]) -> Any:
    """Call a class without a dataclass of ours with keyword arguments."""
    partial = arguments.pop("_partial_", False)
    arguments = {key: value for key, value in arguments.items() if key not in parts}
    _check_arguments(locate(target), {**arguments, **parts}, target, "", complete=not partial)
    # Parts are not passed to Hydra, which would turn lists, dicts and dataclasses into configs.
    try:
        factory = hydra.utils.instantiate(arguments, _partial_=True, _convert_="all")
    except InstantiationException as error:
        # The error of a nested class, without Hydra's text around it.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if partial:
        return functools.partial(factory, **parts) if parts else factory
    return factory(**parts)


def check_targets(node: Any, where: str = "") -> None:
    """Check every `_target_` in `node`, at any depth: it is allowed, exists and takes the arguments beside it.

    Nothing is imported until all names have been checked.

    Raises:
        ConfigError: the first error found.
    """
    check_target_names(node, where)
    for path, target, arguments in _targets(_plain(node), where):
        factory, kind = locate(target, path), schema_of(target)
        if kind is None:
            _check_arguments(factory, arguments, target, path)
            continue
        keys = [field.name for field in fields(kind)]
        if unknown := [str(key) for key in arguments if key not in keys]:
            raise ConfigError(unknown_key(f"{path}.{unknown[0]}".lstrip("."), keys))


def check_target_names(node: Any, where: str = "") -> None:
    """Check that every `_target_` in `node` is allowed, without importing anything.

    Raises:
        ConfigError: the first one that is not.
    """
    for path, target, _ in _targets(_plain(node), where):
        _check_name(path, target)


def locate(target: str, where: str = "") -> Callable[..., Any]:
    """Import and return the class `target`; `where` is the key of its node, for errors.

    Raises:
        ConfigError: the name is not allowed, or the module or its class does not exist.
    """
    _check_name(where, target)
    module_name, _, name = target.rpartition(".")
    at = f"'{where}._target_': " if where else ""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Only a misspelled module is the config's fault, not a missing dependency of the module.
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(f"{at}there is no module '{module_name}'.") from error
    value = getattr(module, name, None)
    if not inspect.isclass(value) or not (target in VETTED or target in targets() or _in_user_package(value)):
        classes = [key for key, each in vars(module).items() if inspect.isclass(each) and _in_user_package(each)]
        raise ConfigError(f"{at}module '{module_name}' has no class '{name}'.{nearest(name, classes)}")
    return value


def allowed_prefixes() -> tuple[str, ...]:
    """Return the prefixes of the user's own packages, from MMLAB_ALLOW_TARGETS."""
    names = os.environ.get(VARIABLE, "").replace(";", ",").split(",")
    return tuple(f"{name.strip().rstrip('.')}." for name in names if name.strip(" ."))


def _check_name(where: str, target: Any) -> None:
    at = f"'{where}._target_'" if where else "_target_"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{at} must be a dotted name such as mmlab.model.connector.MLPConnector, not {target!r}.")
    allowed = [*targets(), *VETTED]
    if target not in allowed and not target.startswith(allowed_prefixes() or ("\0",)):
        raise ConfigError(
            f"{at} '{target}' is not allowed.{nearest(target, allowed)} Allowed are classes with a settings dataclass "
            f"in mmlab and a few classes of Lightning; allow a package of your own with {VARIABLE}=<package>."
        )


def _in_user_package(value: type) -> bool:
    return f"{value.__module__}.".startswith(allowed_prefixes() or ("\0",))


def _check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], name: str, where: str, complete: bool = False
) -> None:
    """Check that `target` takes `arguments` and, with `complete`, that none is missing."""
    parameters = inspect.signature(target).parameters
    at = f"'{where}': " if where else ""
    keys = [key for key in arguments if key not in ("_target_", "_partial_")]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in keys:
            if key not in parameters:
                hint = nearest(str(key), parameters) or f" It takes {', '.join(parameters) or 'none'}."
                raise ConfigError(f"{at}{name} takes no argument '{key}'.{hint}")
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
    if complete and (missing := [parameter for parameter in needed if parameter not in keys]):
        raise ConfigError(f"{at}{name} needs {', '.join(missing)}.")


def _targets(node: Any, where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield (path, target, arguments) of every node with a target."""
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:
            yield where, node["_target_"], node
        for key, value in node.items():
            yield from _targets(value, f"{where}.{key}".lstrip("."))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _targets(value, f"{where}.{i}".lstrip("."))


def _plain(node: Any) -> Any:
    if isinstance(node, DictConfig | ListConfig):
        return OmegaConf.to_container(node, resolve=True)
    return node
