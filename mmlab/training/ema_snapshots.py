"""Snapshots of a run's power-function averages, and the average of any width that is made of them after training.

ema/step-100.safetensors    all averages after a step; a tensor's name is the width of its average and the name of
                            its weight, such as `0.05/denoiser.blocks.0.attn.qkv.weight`
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmlab.config.errors import ConfigError, RunError
from mmlab.runs.disk import DRAFT, replacing, to_json
from mmlab.training.artifacts import artifacts_of
from mmlab.training.power_profile import TOLERANCE, WIDEST, Profile, exponent, fit, reachable
from mmlab.training.sharded_checkpoint import bytes_of, header_of
from mmlab.training.trainable import parts_of
from mmlab.weights import CARD, all_finite, hash_of, whole

FOLDER = "ema"
"""In the run's folder."""
_PREFIX, _SUFFIX = "step-", ".safetensors"


@dataclass(frozen=True)
class PostHocAverage:
    """Averages of a run's weights with a power-function profile that was chosen after training.

    Attributes:
        width: of the profile, relative to the training.
        step: whose weights are the last in the average.
        snapshots: number of steps with a snapshot that it was made of.
        error: of the fitted profile, see `fit`.
        weights: float32, by their names in the model.
    """

    width: float
    step: int
    snapshots: int
    error: float
    weights: dict[str, Tensor]

    @torch.no_grad()
    def put_in(self, model: nn.Module) -> None:
        """Set the weights of a model; the averages of parts that it does not have, which only training used, are left.

        Raises:
            ConfigError: a part has other weights.
        """
        own, parts = dict(model.named_parameters()), parts_of(model)
        for name, value in self.weights.items():
            if name.split(".")[0] not in parts:
                continue
            if name not in own or own[name].shape != value.shape:
                raise ConfigError(f"The run's snapshots are of another model: {name} is not in it in that shape.")
            own[name].copy_(value)

    def describe(self) -> dict[str, Any]:
        """All but the weights, and a hash of them."""
        facts = {"width": self.width, "exponent": exponent(self.width), "step": self.step}
        return facts | {"snapshots": self.snapshots, "profile_error": self.error, "hash": hash_of(self.weights)}


def write_snapshot(
    folder: Path, step: int, averages: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype, first: bool
) -> None:
    """Write a snapshot, in place of an earlier one of the step. All ranks call it, and send their rows.

    Args:
        folder: of the snapshots.
        step: after which the averages were taken.
        averages: width, as a text → name → average.
        dtype: of the file.
        first: whether this is the rank that writes.

    Raises:
        RunError: on the first rank, if the disk is full.
    """
    tensors = {f"{width}/{name}": tensor for width, each in averages.items() for name, tensor in each.items()}
    header = header_of(
        {name: (dtype, tensor.shape) for name, tensor in tensors.items()},
        {"step": str(step), "widths": to_json([float(width) for width in averages])},
    )
    fault: OSError | None = None
    with replacing(_path(folder, step)) if first else nullcontext() as draft:
        with draft.open("wb") if draft else nullcontext() as file:
            if file is not None:
                file.write(header)
            for tensor in tensors.values():
                values = whole(tensor)
                if file is not None and fault is None:
                    try:
                        file.write(bytes_of(values.to(dtype)))
                    except OSError as error:  # the other ranks still send what is left
                        fault = error
                del values  # before the next one is received
        if fault is not None:
            raise fault


def drop_later(folder: Path, step: int) -> None:
    """Remove the snapshots of steps after `step`, which will be trained again, and the drafts of killed processes."""
    later = [path for at, path in _files(folder).items() if at > step]
    for path in [*later, *folder.glob(f"{DRAFT}*")]:
        path.unlink(missing_ok=True)


def average_of_run(run: Path, width: float) -> PostHocAverage:
    """The average of a width at the end of a run's training, made of the run's snapshots.

    Raises:
        ConfigError: the run has no snapshots, none of its end, or too few for the width.
        RunError: a snapshot that is damaged, or not finite.
    """
    with ExitStack() as stack:
        stored = [part for path in _files(run / FOLDER).values() for part in _parts(stack, path)]
        end = _end(run, {part.profile.step for part in stored}, width)
        stored = [part for part in stored if part.profile.step <= end]
        shares, error = _fitted([part.profile for part in stored], Profile(end, width), run)
        weights = {}
        for name in stored[-1].names:
            total = torch.zeros((), dtype=torch.float64)
            for part, share in zip(stored, shares, strict=True):
                total = total + share * part.file.get_tensor(f"{part.prefix}{name}").double()
            weights[name] = total.float()
    if not all_finite(list(weights.values())):
        raise RunError(f"{run / FOLDER} has a snapshot with NaN or infinity, so there is no average: train again.")
    return PostHocAverage(width, end, len({part.profile.step for part in stored}), error, weights)


@dataclass(frozen=True)
class _Part:
    """An average in a snapshot."""

    profile: Profile
    prefix: str
    file: Any

    @property
    def names(self) -> list[str]:
        """Of the weights."""
        return [name.removeprefix(self.prefix) for name in self.file.keys() if name.startswith(self.prefix)]  # noqa: SIM118


def _parts(stack: ExitStack, path: Path) -> list[_Part]:
    """The averages in a snapshot, mapped from the file."""
    try:
        file: Any = stack.enter_context(safe_open(path, framework="pt"))
        facts = file.metadata()
        widths = json.loads(facts["widths"])
        return [_Part(Profile(int(facts["step"]), width), f"{width:g}/", file) for width in widths]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): restore it, or remove it to do without it.") from None


def _end(run: Path, steps: set[int], width: float) -> int:
    """The step of a run's artifacts, of which there is a snapshot.

    Raises:
        ConfigError: there is none.
    """
    asked = f"ema={width:g} is an average of"
    if not steps:
        raise ConfigError(
            f"{asked} snapshots, and {run} keeps none; train it with callbacks=diffusion_posthoc, or leave out ema."
        )
    cards = [json.loads((path / CARD).read_text(encoding="utf-8")) for path in artifacts_of(run).values()]
    end = max((card["steps"] for card in cards if "steps" in card), default=max(steps))
    if end not in steps:
        raise ConfigError(
            f"{asked} the training to step {end}, but the last snapshot of {run} is of step {max(steps)}; leave out "
            "ema, or train it again."
        )
    return end


def _fitted(profiles: Sequence[Profile], target: Profile, run: Path) -> tuple[list[float], float]:
    """As `fit`; raises ConfigError with the possible widths if the error is too large."""
    shares, error = fit(profiles, target) if target.width <= WIDEST else ([], 1.0)
    if error <= TOLERANCE:
        return shares, error
    count, kept = len({profile.step for profile in profiles}), sorted({profile.width for profile in profiles})
    widths = reachable(profiles, target.step)
    raise ConfigError(
        f"ema={target.width:g} cannot be made from the {count} snapshot(s) of {run}, which has averages of width "
        f"{' and '.join(f'{width:g}' for width in kept)}; widths from {widths[0]:g} to {widths[1]:g} can."
    )


def _files(folder: Path) -> dict[int, Path]:
    """Step → snapshot, in order."""
    names = {path.stem.removeprefix(_PREFIX): path for path in folder.glob(f"{_PREFIX}*{_SUFFIX}")}
    return dict(sorted((int(name), path) for name, path in names.items() if name.isdecimal()))


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}{_SUFFIX}"
