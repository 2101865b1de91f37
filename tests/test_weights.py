"""A hash of weights covers every value, and not how they are stored."""

import json

import pytest
import torch
from torch import nn

from mmlab.config.errors import RunError
from mmlab.weights import CARD, content_hash, file_hashes, fill, verify_files


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


def rounded(stored: nn.Module) -> nn.Module:
    """A module in bf16, filled with weights of fp32."""
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to("meta", torch.bfloat16)
    fill(module, stored.state_dict(), "a file")
    return module


def test_a_hash_is_of_what_was_read_until_the_values_change():
    torch.manual_seed(0)
    stored = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module = rounded(stored)
    assert module[0].weight.dtype == torch.bfloat16
    assert content_hash(module) == content_hash(stored) != content_hash(module, trained=True)
    for change in (
        lambda weight: weight.detach().zero_(),
        lambda weight: torch.optim.AdamW([weight], lr=0.1, fused=False).step(),
        lambda weight: setattr(weight, "data", weight.data.clone().fill_(1)),
    ):
        module = rounded(stored)
        module[1].weight.grad = torch.ones_like(module[1].weight)
        change(module[1].weight)
        assert content_hash(module) != content_hash(stored)


def test_a_trained_part_is_hashed_as_it_is_now():
    module = nn.Linear(8, 8)
    before = content_hash(module)
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.AdamW([module.weight], lr=0.1, fused=True).step()  # torch does not count this write
    assert content_hash(module, trained=True) != before


def test_tied_weights_are_cast_once_and_a_dict_is_emptied():
    table = torch.randn(8, 8)
    module = nn.ModuleDict({"first": nn.Linear(8, 8, bias=False), "last": nn.Linear(8, 8, bias=False)})
    module.to("meta", torch.bfloat16)
    weights = {"first.weight": table, "last.weight": table}
    fill(module, weights, "a file")
    assert weights == {}
    assert module["first"].weight.data_ptr() == module["last"].weight.data_ptr()


def test_an_exact_cast_gives_the_same_hash():
    half = nn.Linear(8, 8).half()
    module = nn.Linear(8, 8).to("meta")
    fill(module, half.state_dict(), "a file")
    assert module.weight.dtype == torch.float32 and content_hash(module) == content_hash(half)
