"""How many processes a trainer's section asks for, and whether this machine has devices for them."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError
from mmlab.config.schema import TrainerConfig
from mmlab.runs.ranks import check_devices, world_size


def trainer(**changes) -> DictConfig:
    merged = OmegaConf.merge(OmegaConf.structured(TrainerConfig), changes)
    assert isinstance(merged, DictConfig)
    return merged


@pytest.mark.parametrize(
    ("gpus", "changes", "ranks"),
    [
        (0, {"devices": 2, "num_nodes": 3}, 6),
        (0, {"devices": [0, 1]}, 2),
        (4, {"devices": "auto", "accelerator": "cpu", "num_nodes": 2}, 2),
        (4, {"devices": -1, "accelerator": "cpu"}, 1),
        (4, {"devices": -1, "accelerator": "mps"}, 1),
        (4, {"devices": -1, "accelerator": "gpu", "num_nodes": 2}, 8),
        (4, {"devices": "auto"}, 4),
        (0, {"devices": "auto"}, 1),
    ],
)
def test_world_size(monkeypatch, gpus, changes, ranks):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert world_size(trainer(**changes)) == ranks


@pytest.fixture
def machine(monkeypatch):
    """Sets how many GPUs torch finds, and whether there is mps."""

    def has(gpus: int, mps: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    return has


@pytest.mark.parametrize(
    ("gpus", "mps", "changes"),
    [
        (0, False, {"devices": 3}),
        (0, False, {"devices": "auto"}),
        (0, True, {"accelerator": "gpu"}),
        (2, False, {"accelerator": "gpu", "devices": [1]}),
        (2, False, {"accelerator": "cuda", "devices": 2, "num_nodes": 4}),
        (2, False, {"accelerator": "cpu", "devices": 3}),
        (2, False, {"devices": -1}),
    ],
)
def test_devices_that_are_there(machine, gpus, mps, changes):
    machine(gpus, mps)
    check_devices(trainer(**changes))


@pytest.mark.parametrize(
    ("gpus", "mps", "changes", "sentence"),
    [
        (0, False, {"accelerator": "gpu"}, "trainer.accelerator=gpu, but this machine has no GPU that torch can use"),
        (0, True, {"accelerator": "cuda", "devices": "auto"}, "trainer.accelerator=cuda, but this machine has no GPU"),
        (1, False, {"accelerator": "mps"}, "trainer.accelerator=mps, but this machine has no mps; trainer=cpu"),
        (0, False, {"devices": [0]}, r"trainer.devices=\[0\] names GPUs; on a CPU give their number"),
        (1, False, {"devices": 2}, "trainer.devices=2, but torch finds 1 GPU; trainer.devices=auto"),
        (2, False, {"devices": [0, 2]}, r"trainer.devices=\[0, 2\], but torch finds 2 GPUs, 0 to 1;"),
        (0, True, {"devices": 2}, "trainer.devices=2, but torch finds 1 GPU"),
    ],
)
def test_devices_that_are_not_there(machine, gpus, mps, changes, sentence):
    machine(gpus, mps)
    with pytest.raises(ConfigError, match=sentence):
        check_devices(trainer(**changes))


def test_torchrun_may_show_each_process_one_gpu(machine, monkeypatch):
    machine(1, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    check_devices(trainer(devices=8))
