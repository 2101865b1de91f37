"""What all stages share: which parts of the model are trained, and that the others stay as they are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from mmlab.model.blocks import blocks
from mmlab.model.compiled_layers import CompiledLayers
from mmlab.stage.config import StageConfig
from mmlab.stage.token_loss import rescale_gradients
from mmlab.training.optim import AdamW, gradients_of, log_optimizer, total_norm
from mmlab.training.sharding import ShardedStrategy
from mmlab.training.trainable import parts_of, set_modes, set_trainable
from mmlab.weights import is_sharded


class Stage(LightningModule):
    """Trains some parts of a model, the others frozen; validates the EMA of its weights, if the run keeps one.

    A checkpoint holds the trained weights; frozen parts are filled again from where they came, unless they are random.

    Args:
        config: settings.
        model: its direct children are the parts.
        optim: builds optimizer and schedule.

    Attributes:
        frozen: names of the parts in which nothing is trained.
        sources: the artifact that each part was filled from; set when the parts are filled, as `kept`.
        kept: names of the parts with random frozen weights, which checkpoints and artifacts hold, too.
        bases: what each part with an adapter was before it had one; only the adapter is in checkpoints and artifacts.
        full_step: number of optimizer steps after which a step does everything that steps ever do, for estimates.
        completed: names of the frozen parts that the stage measures something of; artifacts hold them, too.
        compiled: the layers that run compiled in training steps, if any do.

    Raises:
        ConfigError: unknown parts, or none.
    """

    model: Any
    full_step = 10**9

    def __init__(self, config: StageConfig, model: nn.Module, optim: AdamW):
        super().__init__()
        self.config: Any = config
        self.model = model
        self.optim = optim
        self.frozen = set_trainable(model, config.trainable, config.lora)
        self.strict_loading = False
        self.sources: Mapping[str, Path] = {}
        self.kept: list[str] = []
        self.bases: Mapping[str, Mapping[str, Any]] = {}
        self.completed: list[str] = []
        self.compiled: CompiledLayers | None = None

    def rounded(self, precision: str) -> list[str]:
        """Names of the parts whose own weights are used in bf16 at a precision, so that they are read in bf16."""
        return list(parts_of(self.model)) if precision == "bf16-true" else []

    def on_filled(self, artifacts: Mapping[str, Path]) -> None:
        """Check the model, once its parts have their weights.

        Args:
            artifacts: the artifact of an earlier run that each part was filled from; see `fill_parts`.

        Raises:
            ConfigError: weights that this stage cannot start from.
        """

    def configure_model(self) -> None:
        """Shard the model, if the strategy does so."""
        strategy, precision = self.trainer.strategy, str(self.trainer.precision)
        if not isinstance(strategy, ShardedStrategy):
            return
        # Frozen weights are cast when training starts, too; here before they are copied.
        strategy.shard(self.model, blocks(self.model), self.dtypes(precision))

    def dtypes(self, precision: str) -> Callable[[str, nn.Parameter], torch.dtype]:
        """The dtype of a weight during training, as a function of the name of its part and the weight."""
        rounded = self.rounded(precision)

        def dtype(part: str, weight: nn.Parameter) -> torch.dtype:
            half = precision == "bf16-true" or (part in rounded and not weight.requires_grad)
            return torch.bfloat16 if half else torch.float32

        return dtype

    def batch_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        """Numbers that the FLOPs of a batch depend on, see `BatchFlops`."""
        return tuple(size for value in batch.values() if isinstance(value, torch.Tensor) for size in value.shape)

    def without(self, part: nn.Module) -> Tensor | float:
        """Zero, for a loss to which a trained part does not contribute: DDP needs a gradient of every weight.

        The stage removes these zeros before the optimizer step.
        """
        weights = [weight for weight in part.parameters() if not is_sharded(weight)]
        if self.trainer.world_size == 1 or not weights:
            return 0.0
        return 0 * torch.stack([weight.sum() for weight in weights]).sum()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.compiled is not None:
            self.compiled.on = True

    def on_after_backward(self) -> None:
        if self.compiled is not None:
            self.compiled.on = False

    def configure_optimizers(self) -> Any:
        return self.optim.build(self.model, self.trainer.max_steps)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        log_optimizer(self, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients; Lightning's own way cannot mix sharded and whole ones."""
        if gradient_clip_val is None or not isinstance(self.trainer.strategy, ShardedStrategy):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        norm = total_norm(gradients_of(optimizer))
        rescale_gradients(self.model.parameters(), (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))

    def train(self, mode: bool = True) -> "Stage":
        super().train(mode)
        set_modes(self.model, mode)
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        parts = tuple(f"model.{part}." for part in self.frozen)
        kept = tuple(f"model.{part}." for part in self.kept)
        adapted = tuple(f"model.{part}." for part in self.bases)
        weights = {f"model.{name}": p for name, p in self.model.named_parameters(remove_duplicate=False)}
        fixed = {name for name, weight in weights.items() if not weight.requires_grad}
        # Beside an adapter there are neither buffers that learn nor the statistics of 4-bit weights.
        fixed |= {name for name in checkpoint["state_dict"] if name.startswith(adapted) and name not in weights}
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(kept) or not (name in fixed or name.startswith(parts))
        }
