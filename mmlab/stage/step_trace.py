"""A training step on fake tensors: the states that a stage keeps, and its forward and backward pass."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.distributed.device_mesh import DeviceMesh
from transformers import masking_utils

from mmlab.config.build import build
from mmlab.training.cuda_autocast import CudaAutocast
from mmlab.training.flops import FlopCounter
from mmlab.training.live_memory import LiveMemory
from mmlab.training.sharding import ShardedStrategy
from mmlab.weights import local


class StepTrace:
    """Runs a stage that was built on the meta device, within a `FakeTensorMode`: first `states`, then `passes`.

    Args:
        stage: with the dtypes that its weights have in training, unless it is sharded here.
        cfg: of the run.
        chosen: precision.
        mesh: of the ranks among which FSDP shards the model; None: it stays whole.
        micro: micro-batches per optimizer step.
        selected: positions that a mask selects in a micro-batch, see `LiveMemory`.

    Attributes:
        flops: of a micro-batch, after `passes`.
    """

    def __init__(
        self, stage: Any, cfg: DictConfig, chosen: str, mesh: DeviceMesh | None, micro: int, selected: int
    ) -> None:
        self.stage, self.cfg, self.live, self.flops = stage, cfg, LiveMemory(selected), 0.0
        self.plugin: Precision = Precision()
        if "mixed" in chosen:
            self.plugin = MixedPrecision("bf16-mixed", "cpu")
        elif chosen in ("bf16-true", "16-true"):
            self.plugin = HalfPrecision(chosen)
        elif chosen == "64-true":
            self.plugin = DoublePrecision()
        self.strategy: Any = None
        if mesh is not None:
            settings: Any = OmegaConf.to_object(cfg.trainer.fsdp)
            self.strategy = ShardedStrategy(settings)
            self.strategy._device_mesh = {"data_parallel": mesh}
            self.strategy.precision_plugin = SimpleNamespace(precision=chosen)
            self.strategy.model = stage
        self.hold = self.strategy is not None and self.strategy.config.hold_reduction and micro > 1
        stage.trainer = SimpleNamespace(
            strategy=self.strategy,
            precision=chosen,
            world_size=1,
            global_step=stage.full_step,
            accumulate_grad_batches=micro,
        )
        stage.log = stage.log_dict = lambda *args, **options: None

    def states(self, buckets: bool) -> dict[str, int]:
        """Make everything that stays between steps, with DDP's buckets or without, and take an optimizer step.

        Returns:
            Bytes of weights, gradients, buckets, optimizer, average, cache and checkpoint, and the peak of the step.
        """
        live, sizes = self.live, {}

        def grown() -> int:
            before, self._mark = self._mark, live.now
            return live.now - before

        with live:
            self._mark = 0
            _fill_with_fakes(self.stage)
            if self.strategy is not None:
                self.stage.configure_model()
            sizes["weights"] = grown()
            weights = [w for w in self.stage.model.parameters() if w.requires_grad]
            for weight in weights:
                weight.grad = torch.zeros_like(weight)
            sizes["gradients"] = grown()
            self._keep = [torch.empty_like(w) for w in weights] if buckets and self.strategy is None else []
            sizes["buckets"] = grown()
            self.optimizer = build(self.cfg.optim).build(self.stage.model, 1)["optimizer"]
            self._averages: list[Tensor] = []
            self._step()
            sizes["optimizer"] = grown()
            self._averages = self._average()
            sizes["average"] = grown()
            self._cache = _full_cache(self.stage)
            sizes["cache"] = grown()
            live.restart()
            self._step()
            sizes["step"] = live.peak
        trained = sum(local(w).nbytes for w in weights)
        sizes["checkpoint"] = trained + sizes["optimizer"] + sizes["average"]
        return sizes

    def _step(self) -> None:
        self.optimizer.step()
        if self._averages:
            [local(weight.detach()).float() for weight in self.stage.model.parameters() if weight.requires_grad]

    def _average(self) -> list[Tensor]:
        """The averages that callbacks keep."""
        learning = [(name, w) for name, w in self.stage.model.named_parameters() if w.requires_grad]
        averaged: list[Tensor] = []
        for node in filter(None, self.cfg.callbacks.values()):
            if str(node._target_).endswith(".EMA"):
                parts = node.get("parts")
                averaged += [w for name, w in learning if parts is None or name.split(".")[0] in parts]
            elif str(node._target_).endswith(".PostHocEMA"):
                averaged += [w for _, w in learning] * len(node.widths)
        return [torch.empty_like(local(w.detach()), dtype=torch.float32) for w in averaged]

    def passes(self, batch: dict[str, Any] | None, micro: int) -> dict[str, Any]:
        """Run a micro-batch forward and backward: bytes at the peak, see `Estimate`."""
        live, weights = self.live, [w for w in self.stage.model.parameters() if w.requires_grad]
        own = sum(local(w.grad).nbytes for w in weights if w.grad is not None)
        if batch is None:
            return {"activations": None, "gradients_at_peak": own, "passes": live.now}
        first = micro == 1 or self.hold  # of a step; otherwise a later one, with the gradients of the earlier ones
        for weight in weights if first else ():
            weight.register_post_accumulate_grad_hook(self._note)
        live.gradients = own
        with live, ExitStack() as stack:
            stack.enter_context(_unmasked_rows())
            if self.cfg.trainer.accelerator != "cpu":
                stack.enter_context(CudaAutocast())
            counter = stack.enter_context(FlopCounter())
            states = live.now - own
            live.restart()
            if self.hold:
                with self.strategy.block_backward_sync():
                    self._micro_batch(batch, counter, first)
            counter.flops = 0
            self._micro_batch(batch, counter, first and not self.hold)
            self.flops = counter.flops
        gradients = live.gradients_at_peak
        return {"activations": live.peak - states - gradients, "gradients_at_peak": gradients, "passes": live.peak}

    def _micro_batch(self, batch: dict[str, Any], counter: FlopCounter, first: bool) -> None:
        batch = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        with self.plugin.forward_context():
            loss = self.stage.training_step(batch, 0)
        if first:  # Lightning drops the gradients of the last step here, after the forward pass
            self.optimizer.zero_grad()
            self.live.gradients = 0
        counter.in_backward = True
        # `backward` would suspend `CudaAutocast`, with which activations that were not kept have to be computed again.
        _engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
        counter.in_backward = False

    def _note(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.live.gradients += local(weight.grad).nbytes


def _full_cache(stage: Any) -> Tensor | None:
    """Memory of the cache of features, which is then off: what is traced computes them."""
    cache = getattr(stage, "cache", None)
    if cache is None or not cache.budget:
        return None
    full, cache.budget = torch.empty(cache.budget, dtype=torch.uint8), 0
    return full


def _fill_with_fakes(module: nn.Module) -> None:
    """Replace empty weights and buffers by fake tensors on the CPU; tied ones stay tied."""
    fakes: dict[int, Tensor] = {}
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                        fake.__dict__.update(tensor.__dict__)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]  # type: ignore[assignment]


@contextmanager
def _unmasked_rows() -> Iterator[None]:
    """Let transformers see that rows are not packed: of a fake tensor it assumes the worst, and makes a mask."""
    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
