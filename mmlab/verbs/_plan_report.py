"""The lines that `mmlab plan` prints."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.config.locations import Url
from mmlab.data.index import ShardIndex
from mmlab.runs.index_files import has_index
from mmlab.runs.ranks import FSDP
from mmlab.stage.estimate import Estimate, estimate
from mmlab.training.gpus import GPU, GPUS
from mmlab.training.trainer import precision

GIB = 2**30
FREE = 0.1
"""Share of a GPU's memory that is left for CUDA itself, NCCL, kernels' workspaces and fragments of the allocator."""
TARGET = 80
"""GB of the GPU for which another setting is looked for."""


def unknown_gpu(name: str, gpus: Sequence[GPU]) -> ConfigError:
    names = [" ".join(gpu.words) for gpu in gpus]
    return ConfigError(f"'plan.gpu' cannot be '{name}'.{nearest(name, names)} Options: {', '.join(names)}.")


def parts_table(expected: Estimate) -> Iterator[str]:
    """Parameters per part."""
    yield f"{'parameters':<14}{'trainable':>16}{'frozen':>16}"
    for part, count in expected.counts.items():
        yield f"{part:<14}{count['trainable']:>16,}{count['frozen']:>16,}"
    both = [sum(count[kind] for count in expected.counts.values()) for kind in ("trainable", "frozen")]
    yield f"{'all':<14}{both[0]:>16,}{both[1]:>16,}"


def memory_table(cfg: DictConfig, expected: Estimate) -> Iterator[str]:
    """Memory of a device, and the GPUs that have it."""
    trainer = cfg.trainer
    strategy = "ddp" if trainer.strategy.lower().startswith("ddp") or expected.world > 1 else "one device"
    words = [FSDP if trainer.strategy == FSDP else strategy, precision(trainer.precision, trainer.accelerator)]
    words += ["gradient checkpointing"] if trainer.gradient_checkpointing else []
    yield f"memory of each of {expected.world} device(s), GiB: {', '.join(words)}"
    states = {"weights": expected.weights, "optimizer": expected.optimizer, "average": expected.average}
    states |= {"feature cache": expected.cache, "DDP's buckets": expected.buckets}
    gathered = "activations, gathered" if trainer.strategy == FSDP else "activations"
    passes = {"gradients": expected.gradients_at_peak, gathered: expected.activations or 0}
    for name, size in {**states, **passes}.items():
        if size:
            yield f"  {name:<22}{size / GIB:>8.2f}"
    yield f"  {'peak of the passes':<22}{expected.passes / GIB:>8.2f}" + (
        "  without activations: the batches of this stage are not known" if expected.activations is None else ""
    )
    yield f"  {'peak of the step':<22}{expected.step / GIB:>8.2f}"
    sizes = sorted({gb for gpu in GPUS for gb in gpu.gb})
    fit, small = ([gb for gb in sizes if fits(expected.peak, gb) == large] for large in (True, False))
    yield "fits, with a tenth to spare, in GPUs of " + (f"{_listed(fit)} GB" if fit else "no size")
    if small:
        yield f"does not fit in {_listed(small)} GB"


def fits(peak: int, gb: int) -> bool:
    """Whether a GPU has the memory."""
    return peak <= (1 - FREE) * gb * GIB


def step_lines(cfg: DictConfig, expected: Estimate, gpu: GPU) -> Iterator[str]:
    """What a step reads, computes and takes, and the run."""
    data = cfg.data
    batch = f"{data.micro_batch} samples x {expected.micro_batches} micro-batch(es) x {expected.world} device(s)"
    yield f"global batch {data.global_batch} = {batch}"
    if expected.tokens:
        loss = f"{expected.supervised:,} of them in the loss"
        yield f"tokens of a step: at most {expected.tokens:,}, {loss} (rows of data.max_length)"
    steps, why = _steps(cfg)
    if expected.flops:
        rate = expected.world * gpu.tflops * 1e12 * cfg.plan.mfu
        seconds = expected.flops / rate
        most = "at most " if expected.tokens else ""
        share = f"{100 * cfg.plan.mfu:g} % of {' '.join(gpu.words)}'s {gpu.tflops:g} TFLOP/s (bf16)"
        yield f"step: {most}{expected.flops:.3g} FLOPs, {most}{_time(seconds)} at {share}"
        yield f"run: {why}" + (f", {most}{_time(seconds * steps)}" if steps else "")
    else:
        yield f"run: {why}"
    whole = expected.checkpoint * (expected.world if cfg.trainer.strategy == FSDP else 1)
    shares = f", {expected.checkpoint / GIB:.2f} on each device" if cfg.trainer.strategy == FSDP else ""
    yield f"checkpoint: {whole / GIB:.2f} GiB{shares}"
    if (posthoc := cfg.callbacks.get("posthoc_ema")) is not None:
        trained = sum(count["trainable"] for count in expected.counts.values())
        size = trained * len(posthoc.widths) * {"float16": 2, "float32": 4}[posthoc.dtype]
        count = posthoc.snapshots
        yield f"snapshots of averages: {count * size / GIB:.2f} GiB, {count} of {size / GIB:.2f} GiB"


def remedies(cfg: DictConfig, expected: Estimate) -> Iterator[str]:
    """The single settings with which the run would fit in a GPU of `TARGET` GB, if it does not."""
    if fits(expected.peak, TARGET):
        return
    yield f"\nto fit in {TARGET} GB, with one setting:"
    any_fits = False
    for change, peak in _candidates(cfg, expected):
        if fits(peak, TARGET):
            any_fits = True
            yield f"  {change:<44}{peak / GIB:>8.2f} GiB"
    if not any_fits:
        yield "  none of gradient checkpointing, fsdp, a smaller micro-batch, bf16-true and an adapter is enough alone"


def _candidates(cfg: DictConfig, expected: Estimate) -> Iterator[tuple[str, int]]:
    """(overrides, peak) of settings to try."""
    trainer = cfg.trainer
    if not trainer.gradient_checkpointing:
        yield from _tried(cfg, {"trainer.gradient_checkpointing": True})
    if precision(trainer.precision, trainer.accelerator) != "bf16-true":
        yield from _tried(cfg, {"trainer.precision": "bf16-true"})
    yield from _fewer_samples(cfg, expected)
    yield from _more_devices(cfg, expected)
    if "language" in cfg.stage.trainable and not cfg.stage.get("lora"):
        yield from _tried(cfg, {"stage.lora.language.rank": 128}, "+")


def _fewer_samples(cfg: DictConfig, expected: Estimate) -> Iterator[tuple[str, int]]:
    """The largest micro-batch that fits; memory is about linear in it."""
    most = cfg.data.micro_batch
    smaller = [n for n in range(1, most) if (most * expected.micro_batches) % n == 0]
    one = next(_tried(cfg, {"data.micro_batch": 1}), None) if smaller else None
    if one is None or not fits(one[1], TARGET):
        return
    slope = (expected.peak - one[1]) / (most - 1)
    likely = [n for n in smaller if fits(int(one[1] + slope * (n - 1)), TARGET)]
    for n in reversed(likely[1:]):
        tried = next(_tried(cfg, {"data.micro_batch": n}), one)
        if fits(tried[1], TARGET):
            yield tried
            return
    yield one


def _more_devices(cfg: DictConfig, expected: Estimate) -> Iterator[tuple[str, int]]:
    """The fewest devices among which the run fits when it is sharded, as a power of two."""
    per_step = cfg.data.global_batch // cfg.data.micro_batch
    numbers = [2**n for n in range(1, per_step.bit_length()) if per_step % 2**n == 0]
    now = expected.world if cfg.trainer.strategy == FSDP else 0
    for number in [n for n in numbers if n > now]:
        nodes = max(1, number // 8)
        changes: dict[str, Any] = {} if now else {"trainer.strategy": FSDP}
        changes |= {"trainer.devices": number // nodes} | ({"trainer.num_nodes": nodes} if nodes > 1 else {})
        tried = next(_tried(cfg, changes), None)
        if tried is None or fits(tried[1], TARGET):
            yield from [] if tried is None else [tried]
            return


def _tried(cfg: DictConfig, changes: dict[str, Any], sign: str = "") -> Iterator[tuple[str, int]]:
    """The overrides and the peak with them, if such a run can be built."""
    changed = OmegaConf.merge(cfg)
    with open_dict(changed):
        for key, value in changes.items():
            OmegaConf.update(changed, key, value)
    words = " ".join(f"{sign}{key}={str(value).lower()}" for key, value in changes.items())
    try:
        yield words, estimate(changed).peak  # type: ignore[arg-type]
    except ConfigError:
        return


def _steps(cfg: DictConfig) -> tuple[int, str]:
    """Optimizer steps of the run, 0 if the data are not here, and the words for them."""
    trainer, limits = cfg.trainer, []
    data: Any = OmegaConf.to_object(cfg.data)
    streamed = getattr(data, "streamed", False)
    if trainer.max_steps is not None:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None:
        folders = [data.folder(source) for source in data.train]
        if not streamed and not all(isinstance(folder, Url) or has_index(folder) for folder in folders):
            return 0, f"{trainer.max_epochs:g} epoch(s) of data that are not here"
        try:
            indexes = [] if streamed else [ShardIndex.open(folder, data.cache) for folder in folders]
        except UserError as error:
            return 0, f"{trainer.max_epochs:g} epoch(s) of data that cannot be read here: {error}"
        samples = data.loader.samples if streamed else sum(map(len, indexes))
        limits.append(int(Fraction(str(trainer.max_epochs)) * samples / cfg.data.global_batch))
    unknown = " (without an index, the samples of a pass are unknown)" if streamed and not data.loader.samples else ""
    return min(limits), f"{min(limits):,} steps{unknown}"


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
