"""The devices of a run; torch is loaded only where this machine's have to be counted."""

import os

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError


def world_size(trainer: DictConfig) -> int:
    """Return the number of processes, devices × nodes.

    `auto` and -1 are all GPUs of this machine; without one, on a CPU and on mps they are one process.

    Raises:
        ConfigError: `trainer.devices` is neither a number, a list of numbers nor `auto`.
    """
    devices = trainer.devices
    if OmegaConf.is_list(devices) and len(devices) and all(isinstance(number, int) for number in devices):
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


def check_devices(trainer: DictConfig) -> None:
    """Compare `trainer` with this machine: where the run starts, which is not where a job is submitted.

    Raises:
        ConfigError: this machine lacks the accelerator, or some of the devices.
    """
    import torch

    kind, devices = trainer.accelerator, trainer.devices
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    there = {"cpu": 0, "cuda": gpus, "mps": int(mps)}.get(kind, 1 if mps else gpus)
    if kind in ("gpu", "cuda", "mps") and not there:
        what = "mps" if kind == "mps" else "GPU that torch can use"
        raise ConfigError(f"trainer.accelerator={kind}, but this machine has no {what}; trainer=cpu trains without.")
    if OmegaConf.is_list(devices) and not there:
        raise ConfigError(f"trainer.devices={devices} names GPUs; on a CPU give their number, as in trainer.devices=1.")
    if there == 1 and "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may show each process its own GPU alone
        return
    wanted = range(devices) if isinstance(devices, int) else devices if OmegaConf.is_list(devices) else ()
    if there and any(number not in range(there) for number in wanted):
        count = f"{there} GPU{'' if there == 1 else 's, 0 to ' + str(there - 1)}"
        raise ConfigError(f"trainer.devices={devices}, but torch finds {count}; trainer.devices=auto takes all.")
