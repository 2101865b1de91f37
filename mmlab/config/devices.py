"""The devices of a run; torch is loaded only where this machine's have to be counted."""

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError


def world_size(trainer: DictConfig) -> int:
    """Return the number of processes, devices × nodes.

    `auto` and -1 are all GPUs of this machine; without one, on a CPU and on mps they are one process.

    Raises:
        ConfigError: `trainer.devices` is neither a number, a list of numbers nor `auto`.
    """
    devices = trainer.devices
    if OmegaConf.is_list(devices) and len(devices):
        return len(devices) * trainer.num_nodes
    if isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1):
        if devices > 0:
            return devices * trainer.num_nodes
    elif devices != "auto":
        raise ConfigError(f"'trainer.devices' must be a number above 0, a list of numbers or auto, not {devices!r}.")
    if trainer.accelerator in ("cpu", "mps"):
        return trainer.num_nodes
    import torch

    return max(1, torch.cuda.device_count()) * trainer.num_nodes
