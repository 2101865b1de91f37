"""How many processes a trainer's section asks for."""

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from mmlab.config.devices import world_size
from mmlab.config.schema import TrainerConfig


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
