"""From a config to objects: which classes a config may name, and how they receive their settings.

A class of ours takes its settings dataclass as its first argument, then its parts by name, which are built first; a
class that has only parts takes only these. A class from the user's own package takes the keys of its YAML as keyword
arguments, unless it inherits a constructor of ours that takes `config`.

People exchange configs, and `_target_: os.system` would run a command. A target is therefore checked by name before
anything is imported: allowed are classes with a settings dataclass in mmlab, a few classes of Lightning, and packages
that the user allows: `MMLAB_ALLOW_TARGETS=mylab,other.package`.
"""

import functools
import gc
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from mmlab.config.errors import ConfigError, nearest
from mmlab.config.fields import unknown_key
from mmlab.config.schemas import schema_of, schemas, targets

VETTED = (
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.MLFlowLogger",
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
        check_targets(node)
        node = _settings(node, parts)
    target = node.get("_target_") if isinstance(node, Mapping) else node._target_
    if target is None:
        return None
    if is_dataclass(node) and (target in targets() or settings_of(locate(target)) is not None):
        return _build_configured(node, target, parts)
    return _build_with_keywords(node, target, parts)


def settings_of(factory: Callable[..., Any]) -> type | None:
    """Return the dataclass that a class takes as `config`: its own, or that of the nearest base of ours.

    None for a class that takes keyword arguments.
    """
    if next(iter(inspect.signature(factory).parameters), None) != "config":
        return None
    bases = [base for base in inspect.getmro(factory) if base.__module__.startswith("mmlab.")]  # type: ignore[arg-type]
    return next((kind for base in bases if (kind := schemas().get(f"{base.__name__}Config")) is not None), None)


def has_settings(kind: type) -> bool:
    """Whether a dataclass has fields besides its target and its parts; otherwise it is not passed to its class."""
    return any(not field.name.startswith("_") and "group" not in field.metadata for field in fields(kind))


def _settings(node: Any, parts: Mapping[str, Any]) -> Any:
    """The settings of `node`: the dataclass of its class, or a dict if the class has none."""
    target = node.get("_target_")
    kind = schema_of(target) or (settings_of(locate(target)) if target is not None else None)
    if kind is not None and not (isinstance(node, DictConfig) and _is_kind(OmegaConf.get_type(node), kind)):
        node = OmegaConf.merge(OmegaConf.structured(kind), _plain(node))
    if not isinstance(node, DictConfig):
        return node
    for name in parts.keys() & set(node):
        node = OmegaConf.merge(node, {name: None})  # built already, so `node` may lack it
    return OmegaConf.to_object(node)


def _build_configured(config: Any, target: str, parts: dict[str, Any]) -> Any:
    """Call a class with its settings, `X(config, **parts)`; a class without settings of its own, `X(**parts)`."""
    for name in (field.name for field in fields(config) if "group" in field.metadata):
        if name not in parts:
            value = getattr(config, name)
            parts[name] = None if value is None else build(value)
    factory = locate(target)
    if has_settings(type(config)):
        factory = functools.partial(factory, config)
    if getattr(config, "_partial_", False):
        return functools.partial(factory, **parts)
    return factory(**parts)


def _build_with_keywords(node: Any, target: str, parts: dict[str, Any]) -> Any:
    """Call a user's class with the keys of its YAML as keyword arguments, the parts among them built."""
    factory = locate(target)
    values = {f.name: getattr(node, f.name) for f in fields(node)} if is_dataclass(node) else dict(node)
    values = _keywords(values, type(node) if is_dataclass(node) else None, factory)
    partial = values.pop("_partial_", False)
    arguments = {key: _built(value) for key, value in values.items() if key not in parts and key != "_target_"}
    _check_arguments(factory, {**arguments, **parts}, target, "", complete=not partial)
    factory = functools.partial(factory, **arguments, **parts)
    return factory if partial else factory()


def _built(value: Any) -> Any:
    """`value`, with everything in it that has a target built."""
    if isinstance(value, Mapping):
        return build(value) if "_target_" in value else {key: _built(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_built(each) for each in value]
    return build(value) if hasattr(value, "_target_") and is_dataclass(value) else value


def _keywords(values: Mapping[str, Any], kind: type | None, factory: Callable[..., Any]) -> dict[str, Any]:
    """`values` without the untouched defaults of the dataclass `kind` that a user's class does not take."""
    parameters = inspect.signature(factory).parameters
    if kind is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(values)
    defaults = OmegaConf.to_container(OmegaConf.structured(kind), resolve=False)
    assert isinstance(defaults, dict)

    def untouched(key: str, value: Any) -> bool:
        return value == defaults.get(key) or str(defaults.get(key)).startswith("${")

    kept = {key: value for key, value in values.items() if key in parameters or not untouched(key, value)}
    return kept | {key: values[key] for key in ("_partial_",) if key in values}


def _is_kind(kind: Any, base: type) -> bool:
    return inspect.isclass(kind) and issubclass(kind, base)


def check_targets(node: Any, where: str = "") -> None:
    """Check every `_target_` in `node`, at any depth: it is allowed, exists and takes the arguments beside it.

    Nothing is imported until all names have been checked.

    Raises:
        ConfigError: the first error found.
    """
    check_target_names(node, where)
    for path, target, arguments, kind in _targets(node, _plain(node), where):
        factory, own = locate(target, path), schema_of(target)
        settings = own or settings_of(factory)
        if own is not None and kind is not None and not issubclass(kind, own):
            raise ConfigError(
                f"'{path}._target_' is {target}, but the section has the settings of another class; choose it with "
                "its config group."
            )
        if settings is None:
            _check_arguments(factory, _keywords(arguments, kind, factory), target, path)
            continue
        keys = [field.name for field in fields(kind if _is_kind(kind, settings) else settings)]  # type: ignore[arg-type]
        if unknown := [str(key) for key in arguments if key not in keys]:
            raise ConfigError(unknown_key(f"{path}.{unknown[0]}".lstrip("."), keys))


def check_target_names(node: Any, where: str = "") -> None:
    """Check that every `_target_` in `node` is allowed, without importing anything.

    Raises:
        ConfigError: the first one that is not.
    """
    for path, target, _, _ in _targets(node, _plain(node), where):
        _check_name(path, target)


@contextmanager
def collected_later() -> Iterator[None]:
    """Around imports: without the garbage collector, which walks over all modules so far again and again.

    Importing torch, transformers and Lightning takes a fifth less CPU time. What comes with torch stays until the
    process ends, so it is taken out of later collections, too.
    """
    enabled, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if first and "torch" in sys.modules:
                gc.freeze()
            gc.enable()


def locate(target: str, where: str = "") -> Callable[..., Any]:
    """Import and return the class `target`; `where` is the key of its node, for errors.

    Raises:
        ConfigError: the name is not allowed, or the module or its class does not exist.
    """
    _check_name(where, target)
    module_name, _, name = target.rpartition(".")
    at = f"'{where}._target_': " if where else ""
    try:
        with collected_later():
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
        hint = nearest(target, allowed) if target.startswith(("mmlab.", "lightning.")) else ""
        raise ConfigError(
            f"{at} '{target}' is not allowed.{hint} Allowed are classes with a settings dataclass "
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


def _targets(node: Any, plain: Any, where: str) -> Iterator[tuple[str, Any, Mapping[str, Any], type | None]]:
    """Yield (path, target, arguments, dataclass or None) of every node with a target; `plain` is `node` resolved."""
    if isinstance(plain, Mapping):
        kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
        if plain.get("_target_") is not None:
            yield where, plain["_target_"], plain, kind if is_dataclass(kind) else None
        pairs: Any = plain.items()
    elif isinstance(plain, list | tuple):
        pairs = enumerate(plain)
    else:
        return
    for key, value in pairs:
        child = node[key] if isinstance(value, Mapping | list | tuple) else value
        yield from _targets(child, value, f"{where}.{key}".lstrip("."))


def _plain(node: Any) -> Any:
    if isinstance(node, DictConfig | ListConfig):
        return OmegaConf.to_container(node, resolve=True)
    return node
