"""Fully sharded data parallelism (FSDP2): each rank keeps a share of weights, gradients and optimizer state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
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
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """The one dimension along which everything is sharded."""
        return self.device_mesh["data_parallel"]

    def shard(
        self, model: nn.Module, blocks: Sequence[nn.Module], dtype: Callable[[str, nn.Parameter], torch.dtype]
    ) -> None:
        """Cast and shard a model, block by block: no more than a block is ever held whole.

        Args:
            model: its direct children are the parts; its weights may be mapped from files in any dtype.
            blocks: modules of the parts that are gathered together.
            dtype: of a weight, from the name of its part and itself.
        """
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.precision_plugin.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        elif self.precision_plugin.precision == "bf16-true":
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        for name, part in parts_of(model).items():
            whole = stays_whole(part, self.config)
            for unit in [*(() if whole else inside(part, blocks)), part]:
                for weight in unit.parameters():
                    if not is_sharded(weight):
                        weight.data = weight.data.to(dtype(name, weight))
                if not whole:
                    # Without resharding, weights that change after a validation would not be gathered again.
                    fully_shard(unit, mesh=self.mesh, reshard_after_forward=True, mp_policy=policy)
            for method in () if whole else getattr(part, "forward_methods", ()):
                register_fsdp_forward_method(part, method)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """For all micro-batches of a step but the last: keep gradients whole, if the settings say so."""
        roots = _roots(self.model) if self.config.hold_reduction and self.model is not None else []
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)


def stays_whole(part: nn.Module, config: FSDPConfig) -> bool:
    """Whether each rank keeps all weights of a part: of a small frozen one, which would be gathered all the time."""
    weights = list(part.parameters())
    frozen = not any(weight.requires_grad for weight in weights)
    return frozen and sum(weight.numel() for weight in weights) < config.whole_below


def inside(part: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks of a part, without the part itself."""
    modules = set(part.modules()) - {part}
    return [block for block in blocks if block in modules]


def _roots(module: nn.Module) -> list[Any]:
    """The outermost sharded modules."""
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _roots(child)]
