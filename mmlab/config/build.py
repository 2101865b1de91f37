"""The only door to `hydra.utils.instantiate`: which classes a config may name, and with which arguments.

A config is text that people send to each other, and `_target_: os.system` would run a command. A target is
therefore refused by its name, before anything is imported, unless it is a class of ours, one of a few vetted
classes of Lightning, or in a package that the user vouches for: `MMLAB_ALLOW_TARGETS=mylab,other.package`.
"""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.config.fields import schema_fields

PACKAGES = tuple(
    f"mmlab.{layer}." for layer in ("model", "stage", "data", "training", "evaluate", "diffusion", "curate")
)
VETTED = (
    "lightning.Trainer",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.loggers.WandbLogger",
)
VARIABLE = "MMLAB_ALLOW_TARGETS"
OURS = ("_target_", "_partial_")


def build(node: DictConfig | Mapping[str, Any], **kwargs: Any) -> Any:
    """Build the object that `node` describes, its parts first.

    Args:
        node: a mapping with `_target_`; plain mappings and lists in it arrive as dict and list. Fields that
            the schema marks `for_verb` are left out.
        **kwargs: passed to the outermost class as they are; they win over the node's keys.

    Returns:
        The object; a partial of its class with `_partial_: true`; None when `_target_` is null.

    Raises:
        ConfigError: a target that is not allowed or not there, an argument that its class does not take, or whatever
            a part finds wrong with its own.
    """
    plain = _plain(node)
    if plain.get("_target_") is None:
        return None
    check_targets(plain)
    partial = plain.pop("_partial_", False)
    target = locate(plain["_target_"])
    plain = {key: value for key, value in plain.items() if key not in kwargs}
    _check_arguments(target, {**plain, **kwargs}, plain["_target_"], "", complete=not partial)
    # Kwargs stay out of Hydra's sight: it would turn lists, dicts and dataclasses into configs.
    try:
        factory = hydra.utils.instantiate(plain, _partial_=True, _convert_="all")
    except InstantiationException as error:
        # A part's own sentence, without Hydra's frame around it.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    if partial:
        return functools.partial(factory, **kwargs) if kwargs else factory
    return factory(**kwargs)


def check_targets(node: Any, where: str = "") -> None:
    """Check every `_target_` in `node`, at any depth: allowed, existing, and given only arguments it takes.

    Nothing is imported until all the names are allowed.

    Raises:
        ConfigError: the first target that is not.
    """
    check_target_names(node, where)
    for path, target, arguments in _targets(_plain(node), where):
        _check_arguments(locate(target, path), arguments, target, path)


def check_target_names(node: Any, where: str = "") -> None:
    """Check that every `_target_` in `node` is allowed, by its name alone.

    Raises:
        ConfigError: the first one that is not.
    """
    for path, target, _ in _targets(_plain(node), where):
        _check_name(path, target)


def locate(target: str, where: str = "") -> Callable[..., Any]:
    """Import and return the class that `target` names.

    Raises:
        ConfigError: the name is not allowed, or it is not a class of the module that it names.
    """
    _check_name(where, target)
    module_name, _, name = target.rpartition(".")
    at = f"'{where}._target_': " if where else ""
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of the module is another matter than a misspelt module.
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise ConfigError(f"{at}there is no module '{module_name}'.{_nearest_module(module_name)}") from error
    found = getattr(module, name, None)
    own = target in VETTED or (inspect.isclass(found) and _is_own(found, module_name, target))
    if not inspect.isclass(found) or not own:
        classes = [key for key, value in vars(module).items() if _is_own(value, module_name, target)]
        raise ConfigError(f"{at}module '{module_name}' has no class '{name}'.{nearest(name, classes)}")
    return found


def allowed_prefixes() -> tuple[str, ...]:
    """Return the prefixes of the user's own packages, from MMLAB_ALLOW_TARGETS."""
    names = os.environ.get(VARIABLE, "").replace(";", ",").split(",")
    return tuple(f"{name.strip().rstrip('.')}." for name in names if name.strip(" ."))


def _check_name(where: str, target: Any) -> None:
    at = f"'{where}._target_'" if where else "_target_"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{at} must be a dotted name such as mmlab.model.connector.MLPConnector, not {target!r}.")
    prefixes = (*PACKAGES, *allowed_prefixes())
    if target not in VETTED and not target.startswith(prefixes):
        packages = ", ".join(prefix.rstrip(".") for prefix in prefixes)
        raise ConfigError(
            f"{at} '{target}' is not allowed.{nearest(target, VETTED)} A config names classes of {packages} "
            f"and a few of Lightning; vouch for a package of your own with {VARIABLE}=<package>."
        )


def _is_own(value: Any, module_name: str, target: str) -> bool:
    """Whether `value` is a class defined where the config says, not one that the module imported."""
    if not inspect.isclass(value):
        return False
    return value.__module__ == module_name if target.startswith("mmlab.") else _in_user_package(value)


def _in_user_package(value: type) -> bool:
    return f"{value.__module__}.".startswith(allowed_prefixes())


def _nearest_module(module_name: str) -> str:
    parent, _, name = module_name.rpartition(".")
    spec = importlib.util.find_spec(parent) if parent.count(".") <= 1 else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    names = [file.removesuffix(".py") for folder in folders for file in os.listdir(folder)]
    return nearest(name, [n for n in names if not n.startswith("_")])


def _check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], name: str, where: str, complete: bool = False
) -> None:
    """Compare `arguments` with the signature of `target`; with `complete`, nothing may be missing either."""
    parameters = inspect.signature(target).parameters
    at = f"'{where}': " if where else ""
    keys = [key for key in arguments if key not in OURS]
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
    """Resolve `node` into dicts and lists, without the keys that the verb reads itself."""
    if isinstance(node, DictConfig | ListConfig):
        plain = OmegaConf.to_container(node, resolve=True, enum_to_str=True)
        _drop_verb_keys(node, plain)
        return plain
    if isinstance(node, Mapping):
        return {key: _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, list | tuple) else node


def _drop_verb_keys(node: DictConfig | ListConfig, plain: Any) -> None:
    for key, field in schema_fields(node).items():
        if field.metadata.get("verb"):
            plain.pop(key, None)
    for key in list(plain) if isinstance(plain, dict) else range(len(plain)):
        if isinstance(plain[key], dict | list):
            _drop_verb_keys(node[key], plain[key])
