"""Which parts are trained is data: a list of names; everything else is frozen."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from mmlab.config.errors import ConfigError, nearest


@runtime_checkable
class HasUnused(Protocol):
    """A module with weights that no output depends on. They are never trained: without their gradients data parallelism
    would fail."""

    def unused(self) -> Iterable[nn.Parameter]: ...


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a model that a config can name: its direct children."""
    return dict(model.named_children())


def set_trainable(model: nn.Module, trainable: Sequence[str], adapted: Iterable[str] = ()) -> list[str]:
    """Make the named parts trainable, except unused weights, and freeze the rest: no gradient, eval mode.

    Args:
        model: its direct children are the parts.
        trainable: names such as `connector`, or dotted names inside a part such as `language.causal.lm_head`.
        adapted: parts among them of which only an adapter will be trained, see `mmlab.training.lora`; all their own
            weights are frozen.

    Returns:
        The names of the frozen parts.

    Raises:
        ConfigError: a name that is not in the model or whose weights are all unused, or no name at all; a part that is
            adapted but not trainable.
    """
    parts = parts_of(model)
    for name in trainable:
        try:
            model.get_submodule(name)
        except AttributeError as error:
            hint = nearest(name, parts)
            raise ConfigError(f"stage.trainable names '{name}', but the parts are {', '.join(parts)}.{hint}") from error
    if not trainable:
        raise ConfigError(f"stage.trainable is empty; name at least one of {', '.join(parts)}.")
    model.requires_grad_(False)
    for name in trainable:
        model.get_submodule(name).requires_grad_(True)
    for module in model.modules():
        for parameter in module.unused() if isinstance(module, HasUnused) else ():
            parameter.requires_grad_(False)
    for name in trainable:
        parameters = list(model.get_submodule(name).parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise ConfigError(f"stage.trainable names '{name}', but no output of the model depends on it.")
    frozen = [name for name, part in parts.items() if not any(p.requires_grad for p in part.parameters())]
    for name in adapted:
        if name in trainable and (inner := [each for each in trainable if each.startswith(f"{name}.")]):
            raise ConfigError(
                f"stage.trainable names '{inner[0]}', but of '{name}' only an adapter is trained (stage.lora); "
                "leave it out, or train the part without an adapter."
            )
        if name not in trainable or name not in parts:
            whole = [part for part in trainable if part in parts]
            hint = nearest(name, whole) or f" Trained parts: {', '.join(whole) or 'none'}."
            raise ConfigError(f"stage.lora names '{name}', which is not a part in stage.trainable.{hint}")
        parts[name].requires_grad_(False)
    set_modes(model)
    return frozen


def set_modes(model: nn.Module, training: bool = True) -> None:
    """Put trained modules in train mode and frozen ones in eval mode, where dropout and running statistics are off."""
    model.train(training)
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters per part: `{part: {"trainable": n, "frozen": m}}`; a tied weight counts once."""
    counts: dict[str, dict[str, int]] = {}
    loose = dict(model.named_parameters(recurse=False))
    for name, part in parts_of(model).items():
        counts[name] = _count(part.parameters())
    if loose:
        counts["own"] = _count(loose.values())
    return counts


def _count(parameters) -> dict[str, int]:
    count = {"trainable": 0, "frozen": 0}
    for parameter in parameters:
        packed = getattr(parameter, "quant_state", None)  # 4-bit weights, two in a byte
        size = parameter.numel() if packed is None else packed.shape.numel()
        count["trainable" if parameter.requires_grad else "frozen"] += size
    return count
