"""Fully sharded data parallelism (FSDP2): each rank keeps a share of weights, gradients and optimizer state."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from mmlab.training.checkpoint_io import FolderCheckpointIO
from mmlab.training.config import FSDPConfig
from mmlab.training.sharded_checkpoint import restore_module, restore_optimizer
from mmlab.training.trainable import parts_of
from mmlab.weights import is_sharded


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy for a stage that shards its model in `configure_model` with `shard`.

    All ranks are data parallel; nothing is tensor parallel.

    Args:
        config: settings.
    """

    def __init__(self, config: FSDPConfig):
        super().__init__(tensor_parallel_size=1)
        self.config = config
        self._averaged: list[nn.Parameter] = []
        self._buffers: list[tuple[nn.Module, str]] = []

    # Checkpoints: as with DDP, but each rank writes and reads its own rows of what is sharded.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        # The model is sharded before setup, so callbacks can find the state of a checkpoint as early as with DDP.
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        self._folder_io.save_sharded(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self._folder_io.load_mapped(Path(self.broadcast(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        restore_module(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            restore_optimizer(optimizer, state)

    @property
    def _folder_io(self) -> FolderCheckpointIO:
        assert isinstance(self.checkpoint_io, FolderCheckpointIO)
        return self.checkpoint_io

    def setup_environment(self) -> None:
        # Lightning takes the size when the strategy is built, which is before it knows the devices.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """The one dimension along which everything is sharded."""
        return self.device_mesh["data_parallel"]

    def shard(
        self, model: nn.Module, blocks: Sequence[nn.Module], dtype: Callable[[str, nn.Parameter], torch.dtype]
    ) -> None:
        """Cast and shard a model block by block, so that a device holds no more than one block whole.

        Weights that cannot be sharded stay whole on each rank: scalars, which have no rows, weights that several units
        share, and the model's own, which are in no part. Their gradients are averaged over the ranks.

        Args:
            model: its direct children are the parts; its weights may be mapped from files in any dtype.
            blocks: modules inside the parts whose weights are gathered together.
            dtype: function of the name of a part and a weight of it; the dtype of the weight in training.
        """
        parts = parts_of(model)
        units = {name: [*inside(part, blocks), part] for name, part in parts.items()}
        ignored = unsharded(units)
        for weight in model.parameters(recurse=False):
            weight.data = weight.data.to(dtype("", weight))
        for name, part in parts.items():
            whole = stays_whole(part, self.config, ignored)
            for unit in units[name]:
                for weight in unit.parameters():
                    if not is_sharded(weight):
                        weight.data = weight.data.to(dtype(name, weight)).contiguous()
                if not whole:
                    # Without resharding, weights that change after a validation would not be gathered again.
                    policy = self._policy(unit, getattr(part, "exact", False))
                    options: Any = {"mp_policy": policy, "ignored_params": ignored}
                    fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, **options)
                    for method in getattr(unit, "forward_methods", ()):
                        gather_in(unit, method)
        self._averaged = [p for p in model.parameters() if p.requires_grad and not is_sharded(p)]
        self._buffers = [
            (module, name)
            for part in parts.values()
            if any(weight.requires_grad for weight in part.parameters())
            for module in part.modules()
            for name, _ in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        ]

    def _policy(self, unit: nn.Module, exact: bool) -> MixedPrecisionPolicy:
        """Gather in bf16 what autocast would cast, unless it is to be exact; gradients are reduced in fp32."""
        precision = self.precision_plugin.precision
        learns = any(weight.requires_grad for weight in unit.parameters())
        # A batch norm in bf16 does not take its statistics in fp32.
        exact = exact or any(isinstance(module, _BatchNorm) for module in unit.modules())
        # Frozen weights have their dtype already, and a stage may use them outside autocast.
        casts = precision == "bf16-mixed" and learns and not exact
        return MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if casts else None,
            reduce_dtype=None if precision == "32-true" else torch.float32,
            cast_forward_inputs=False,
        )

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of weights that are not sharded over the ranks.

        This is done after each micro-batch: averaging again does not change what is already averaged.
        """
        super().post_backward(closure_loss)
        gradients = [weight.grad for weight in self._averaged if weight.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten().float() for gradient in gradients])
            distributed.all_reduce(flat)
            shares = (flat / self.world_size).split([gradient.numel() for gradient in gradients])
            for gradient, share in zip(gradients, shares, strict=True):
                gradient.copy_(share.view_as(gradient))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Step, then copy the first rank's buffers to all, as DDP does: running statistics differ between ranks."""
        result = super().optimizer_step(*args, **kwargs)
        for module, name in self._buffers:
            distributed.broadcast(module.get_buffer(name), 0)
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Entered for all micro-batches of a step but the last: with `hold_reduction`, gradients are not reduced."""
        roots = _roots(self.model) if self.config.hold_reduction and self.model is not None else []
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)


def minimum_over_ranks(trainer: Any, numbers: Tensor) -> Tensor:
    """The elementwise minimum over the ranks if they share the weights, so that all of them see a fault in any share.

    Args:
        trainer: without `ShardedStrategy` each rank has all weights, and its numbers are returned.
        numbers: of any shape.
    """
    if not isinstance(trainer.strategy, ShardedStrategy):
        return numbers
    numbers = numbers.to(trainer.strategy.root_device)
    distributed.all_reduce(numbers, distributed.ReduceOp.MIN)
    return numbers


def stays_whole(part: nn.Module, config: FSDPConfig, ignored: Set[nn.Parameter] = frozenset()) -> bool:
    """Whether a part is not sharded: a small frozen one, which would be gathered again for every micro-batch.

    Args:
        part: of the model.
        config: settings.
        ignored: weights that are never sharded.
    """
    weights = [weight for weight in part.parameters() if weight not in ignored]
    frozen = not any(weight.requires_grad for weight in weights)
    return not weights or (frozen and sum(weight.numel() for weight in weights) < config.whole_below)


def unsharded(units: Mapping[str, Sequence[nn.Module]]) -> set[nn.Parameter]:
    """The weights that cannot be sharded: scalars, and those that belong to several units.

    Args:
        units: name of a part → its modules that are sharded, the inner ones first.
    """
    owner: dict[nn.Parameter, nn.Module] = {}
    ignored: set[nn.Parameter] = set()
    for part in units.values():
        seen: set[nn.Module] = set()
        for unit in part:
            for module in set(unit.modules()) - seen:
                seen.add(module)
                for weight in module.parameters(recurse=False):
                    if weight.dim() == 0 or owner.setdefault(weight, unit) is not unit:
                        ignored.add(weight)
    return ignored


def gather_in(unit: nn.Module, method: str) -> None:
    """Make a method of a sharded module gather its weights, as `forward` does.

    Called by another such method, it does not: it would free the weights before the outer one is done.
    """
    direct = getattr(unit, method)
    register_fsdp_forward_method(unit, method)
    gathering = getattr(unit, method)
    inner = {weight for root in _roots_below(unit) for weight in root.parameters()}
    own = next((name for name, p in unit.named_parameters() if is_sharded(p) and p not in inner), None)

    def call(*args: Any, **kwargs: Any) -> Any:
        gathered = own is not None and not is_sharded(unit.get_parameter(own))
        return (direct if gathered else gathering)(*args, **kwargs)

    setattr(unit, method, call)


def leaf_of(part: nn.Module, weight: nn.Parameter) -> nn.Parameter:
    """The leaf of the autograd graph that a weight takes part in: the gathered weight if it is sharded.

    Args:
        part: that contains the weight.
        weight: of any shape.
    """
    if not is_sharded(weight):
        return weight
    name = next(name for name, other in part.named_parameters() if other is weight)
    path = name.split(".")
    modules = [part.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    unit: Any = [module for module in modules if isinstance(module, FSDPModule)][-1]
    unit.unshard()
    leaf = part.get_parameter(name)
    unit.reshard()
    return leaf


def inside(part: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks of a part, without the part itself."""
    modules = set(part.modules()) - {part}
    return [block for block in blocks if block in modules]


def _roots(module: nn.Module) -> list[Any]:
    """The outermost sharded modules."""
    return [module] if isinstance(module, FSDPModule) else _roots_below(module)


def _roots_below(module: nn.Module) -> list[Any]:
    return [root for child in module.children() for root in _roots(child)]
