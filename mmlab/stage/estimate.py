"""Memory and FLOPs that a run would take, from its own training step on tensors without values.

The stage is built on the meta device, and its step runs under torch's fake tensors: nothing is allocated. The graph is
the real one, with activation checkpointing, frozen parts, adapters, casts, and FSDP on a process group of fake ranks.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmlab.config.build import build
from mmlab.model.quantization import store_empty
from mmlab.runs.check import check_quantized, check_strategy
from mmlab.runs.ranks import FSDP, accumulation, world_size
from mmlab.stage.assembly import build_around
from mmlab.stage.largest_batch import largest_batch, supervised_positions
from mmlab.stage.stage import Stage
from mmlab.stage.step_trace import StepTrace
from mmlab.training.lora import add_adapters
from mmlab.training.trainable import count_parameters, parts_of
from mmlab.training.trainer import precision


@dataclass(frozen=True)
class Estimate:
    """Memory of one device, in bytes, and work of an optimizer step.

    Attributes:
        counts: parameters per part of the whole model, see `count_parameters`.
        world: number of devices.
        weights, gradients, buckets, optimizer, average, cache: what stays between steps; buckets are DDP's second copy
            of the gradients, and the cache of features is full.
        gradients_at_peak, activations: at the peak of the forward and backward pass. Activations include temporary
            tensors and weights that FSDP has gathered; None for a stage whose batches are not known.
        passes: peak of the forward and backward pass.
        step: peak of the optimizer step.
        checkpoint: bytes that the device writes; without FSDP only the first device writes.
        flops: of an optimizer step on all devices, without what is computed a second time.
        micro_batches: per optimizer step.
        tokens, supervised: the most in an optimizer step on all devices; 0 if there are none.
    """

    counts: dict[str, dict[str, int]]
    world: int
    micro_batches: int
    weights: int
    gradients: int
    gradients_at_peak: int
    buckets: int
    optimizer: int
    average: int
    cache: int
    activations: int | None
    passes: int
    step: int
    checkpoint: int
    flops: float
    tokens: int
    supervised: int

    @property
    def peak(self) -> int:
        return max(self.passes, self.step)


def estimate(cfg: DictConfig) -> Estimate:
    """Estimate a run from its config.

    Raises:
        ConfigError: a model or a stage that cannot be built or trained so, or an unknown strategy.
    """
    check_strategy(cfg.trainer)
    check_quantized(cfg)
    strategy, world = cfg.trainer.strategy, world_size(cfg.trainer)
    micro = accumulation(cfg.data.global_batch, cfg.data.micro_batch, world)
    with torch.device("meta"):
        model = build(cfg.model)
    stage = build_around(model, cfg)
    chosen = precision(cfg.trainer.precision, cfg.trainer.accelerator)
    with torch.device("meta"):
        _adapt(stage, cfg)
    if isinstance(stage, Stage) and strategy != FSDP:
        _cast(stage, chosen)
    if getattr(getattr(model, "conditioner", None), "tokenizer", 0) is None:
        model.conditioner.tokenizer = _AnyTokenizer(model.conditioner.max_length)
    counts = count_parameters(model)
    data: Any = OmegaConf.to_object(cfg.data)
    batch = largest_batch(stage, data) if isinstance(stage, Stage) else None
    with ExitStack() as stack:
        # FSDP warns of each part whose output is a view.
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        mesh = stack.enter_context(_simulated(world, strategy == FSDP))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        trace = StepTrace(stage, cfg, chosen, mesh, micro, supervised_positions(stage, batch) if batch else 0)
        sizes = trace.states(strategy.lower().startswith("ddp") or world > 1)
        sizes |= trace.passes(batch, micro)
    tokens = 0 if batch is None or "labels" not in batch or batch["labels"].ndim != 2 else batch["labels"].numel()
    share = micro * world
    return Estimate(
        counts=counts,
        world=world,
        micro_batches=micro,
        flops=trace.flops * share,
        tokens=tokens * share,
        supervised=trace.live.selected * share,
        **sizes,
    )


def _adapt(stage: Any, cfg: DictConfig) -> None:
    """Store weights in 4 bits and add adapters, as filling a stage does."""
    for part in parts_of(stage.model).values():
        if getattr(getattr(part, "settings", None), "quantize", None) is not None:
            store_empty(part.causal)  # type: ignore[arg-type]
    if cfg.stage.get("lora"):
        lora: Any = OmegaConf.to_object(cfg.stage.lora)
        add_adapters(stage.model, lora)


def _cast(stage: Stage, chosen: str) -> None:
    dtype = stage.dtypes(chosen)
    # Lightning casts everything to these.
    whole = {"16-true": torch.float16, "64-true": torch.float64}.get(chosen)
    for name, part in parts_of(stage.model).items():
        for weight in part.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(whole or dtype(name, weight))


@contextmanager
def _simulated(world: int, sharded: bool) -> Iterator[DeviceMesh | None]:
    """Make this process one of `world` ranks whose collectives do nothing, if the model is to be sharded."""
    if not sharded:
        yield None
        return
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("data_parallel",))
    finally:
        dist.destroy_process_group()


class _AnyTokenizer:
    """In place of a tokenizer that is not here."""

    pad_token_id = 0

    def __init__(self, length: int):
        self.length = length

    def __call__(self, texts: list[str], **options: Any) -> dict[str, Tensor]:
        ids = torch.zeros(len(texts), self.length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids}
