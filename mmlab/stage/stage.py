"""What all stages share: which parts of the model learn, and that the others stay as they are."""

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule
from torch import nn

from mmlab.training.optim import AdamW
from mmlab.training.trainable import set_modes, set_trainable


class Stage(LightningModule):
    """Trains some parts of a model, the others frozen.

    A checkpoint holds what learns; frozen parts come from where they came from.

    Args:
        model: its direct children are the parts.
        optim: builds optimizer and schedule.
        trainable: names of the parts that learn, or dotted names inside a part.

    Attributes:
        frozen: names of the parts of which nothing learns.

    Raises:
        ConfigError: unknown parts, or none.
    """

    model: Any

    def __init__(self, model: nn.Module, optim: AdamW, trainable: Sequence[str]):
        super().__init__()
        self.model = model
        self.optim = optim
        self.frozen = set_trainable(model, trainable)
        self.strict_loading = False

    def configure_optimizers(self) -> Any:
        return self.optim.build(self.model, self.trainer.max_steps)

    def train(self, mode: bool = True) -> "Stage":
        super().train(mode)
        set_modes(self.model, mode)
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Older checkpoints list unused weights for the optimizer, which has no state of what never had a gradient.
        learning = sum(weight.requires_grad for weight in self.model.parameters())
        for state in checkpoint.get("optimizer_states", ()):
            if sum(len(group["params"]) for group in state["param_groups"]) > learning:
                for group in state["param_groups"]:
                    group["params"] = [number for number in group["params"] if number in state["state"]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        parts = tuple(f"model.{part}." for part in self.frozen)
        everything = self.model.named_parameters(remove_duplicate=False)
        fixed = {f"model.{name}" for name, weight in everything if not weight.requires_grad}
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if not (name in fixed or name.startswith(parts))
        }
