"""A hash of weights covers every value, and not how they are stored."""

import json

import pytest
import torch
from torch import nn

from mmlab.config.errors import RunError
from mmlab.weights import CARD, content_hash, file_hashes, verify_files


def test_every_value_and_name_counts():
    torch.manual_seed(0)
    module = nn.BatchNorm1d(5000)
    before = content_hash(module)
    assert len(before) == 64 and content_hash(module) == before
    for tensor in module.state_dict().values():
        values = tensor.view(-1).view(torch.uint8)
        values[-1] ^= 0x80  # the sign of one number
        assert content_hash(module) != before
        values[-1] ^= 0x80
    assert content_hash(module) == before
    named = [nn.ModuleDict({name: nn.Linear(1, 1)}) for name in "ab"]
    named[1]["b"].load_state_dict(named[0]["a"].state_dict())
    assert content_hash(named[0]) != content_hash(named[1])


def test_dtype_and_layout_do_not_count_unless_they_round():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        module = nn.Linear(8, 8).to(dtype)
        before = content_hash(module)
        assert content_hash(module.float()) == before == content_hash(module.to(dtype))
    module = nn.Linear(8, 8)
    before = content_hash(module)
    module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
    assert content_hash(module) == before != content_hash(module.to(torch.bfloat16))


def test_long_tensors_are_hashed_to_their_end(monkeypatch):
    module = nn.Linear(8, 8)
    before = content_hash(module)
    monkeypatch.setattr("mmlab.weights.CHUNK", 10)
    assert content_hash(module) == before


def test_what_a_hub_adds_to_a_folder_is_not_part_of_it(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / CARD).write_text(json.dumps({"files": file_hashes(tmp_path)}))
    for name in ("README.md", ".gitattributes", ".cache/huggingface/download/model.safetensors.metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    verify_files(tmp_path)
    (tmp_path / "model.bin").touch()
    with pytest.raises(RunError, match=r"model.bin was added"):
        verify_files(tmp_path)
