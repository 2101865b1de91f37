"""Small checkpoints, and damage to their files."""

from pathlib import Path

import torch

from mmlab.training.checkpoint_io import FolderCheckpointIO


def state(number: int = 0) -> dict:
    return {"weights": torch.arange(1000.0) + number, "rng": (3, (1, 2), None), "step": number}


def save(folder: Path, number: int) -> Path:
    target = folder / f"step-{number}"
    FolderCheckpointIO().save_checkpoint(state(number), target)
    return target


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif how == "zero":
        file.write_bytes(bytes(len(data)))
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
