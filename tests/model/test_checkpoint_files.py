"""Weights in every layout of the hub, mapped from their files, and one sentence for each that cannot be read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import read_checkpoint
from mmlab.model.pretrained import refuse_code

LAYOUTS = ["safetensors", "safetensors shards", "bin", "bin shards", "bin of torch 1.5"]


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"layers.{i}.weight": torch.randn(64, 64) for i in range(4)}


def write(folder: Path, tensors: dict[str, Tensor], layout: str) -> None:
    """Write a checkpoint in one of the layouts, each tensor in a shard of its own."""
    kind, _, rest = layout.partition(" ")
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]

    def save(part: dict[str, Tensor], path: Path) -> None:
        if kind == "safetensors":
            save_file(part, path, {"format": "pt"})
        else:
            torch.save(part, path, _use_new_zipfile_serialization=rest != "of torch 1.5")

    if rest != "shards":
        save(tensors, folder / name)
        return
    stem, end = name.split(".")
    places = {key: f"{stem}-{i + 1:05}-of-{len(tensors):05}.{end}" for i, key in enumerate(tensors)}
    for key, file in places.items():
        save({key: tensors[key]}, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_layout_is_read_as_it_is_stored(tmp_path, layout, dtype):
    stored = {name: weight.to(dtype) for name, weight in weights().items()}
    write(tmp_path, stored, layout)
    read = read_checkpoint(tmp_path)
    assert read.keys() == stored.keys()
    assert all(read[name].dtype == dtype and torch.equal(read[name], weight) for name, weight in stored.items())
    assert list(read_checkpoint(tmp_path, ("layers.1.",))) == ["layers.1.weight"]


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_tensors_are_mapped_from_their_file_which_a_write_does_not_change(tmp_path, layout):
    write(tmp_path, weights(), layout)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    read = read_checkpoint(tmp_path)
    maps = Path("/proc/self/maps")
    if maps.exists():
        places = [line.split() for line in maps.read_text().splitlines() if str(tmp_path) in line]
        spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in places]
        assert all(any(a <= weight.data_ptr() < b for a, b in spans) for weight in read.values())
    for weight in read.values():
        weight.zero_()
    assert all(path.read_bytes() == content for path, content in files.items())


def test_only_shards_with_such_names_are_opened(tmp_path):
    write(tmp_path, weights(), "bin shards")
    (tmp_path / "pytorch_model-00002-of-00004.bin").write_bytes(b"another tower, not needed")
    assert list(read_checkpoint(tmp_path, ("layers.0.", "layers.3."))) == ["layers.0.weight", "layers.3.weight"]


@pytest.mark.parametrize("safe", LAYOUTS[:2])
@pytest.mark.parametrize("pickled", LAYOUTS[2:4])
def test_safetensors_win_over_pickles(tmp_path, safe, pickled):
    write(tmp_path, {"a": torch.zeros(3)}, pickled)
    write(tmp_path, {"a": torch.ones(3)}, safe)
    assert read_checkpoint(tmp_path)["a"].tolist() == [1, 1, 1]


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, zipped):
    harm = tmp_path / "harm"
    folder = tmp_path / "model"
    folder.mkdir()
    torch.save({**weights(), "x": Touch(harm)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.bin holds more than tensors: it names posix\.mkdir, and code"):
        read_checkpoint(folder)
    assert not harm.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_is_named(tmp_path, layout):
    write(tmp_path, weights(), layout)
    damaged = max((path for path in tmp_path.iterdir() if path.suffix != ".json"), key=lambda path: path.name)
    cut(damaged)
    with pytest.raises(ValueError, match=rf"^{damaged.name} is damaged or incomplete.*; download it again\.$"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "pytorch_model-00003-of-00004.bin").unlink(), r"index\.json names .*00003.* missing"),
        (lambda folder: (folder / "pytorch_model.bin.index.json").write_text("{}"), r"index\.json cannot be read"),
        (
            lambda folder: (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../a.bin"}}'),
            r"names a file outside the checkpoint: \.\./a\.bin",
        ),
        (
            lambda folder: (folder / "pytorch_model-00001-of-00004.bin").write_text("version https://git-lfs.github"),
            r"00001-of-00004\.bin is a pointer of Git LFS.* `git lfs pull`",
        ),
        (lambda folder: torch.save([1], folder / "pytorch_model.bin"), r"holds no weights by name, but a list"),
        (
            lambda folder: (folder / "pytorch_model.bin.index.json").unlink(),
            r"nor an index.*; it has pytorch_model-00",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_one_sentence(tmp_path, spoil, message):
    write(tmp_path, weights(), "bin shards")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_gguf_file_alone_says_how_to_load_it(tmp_path):
    (tmp_path / "model.Q4_1.gguf").touch()
    with pytest.raises(ValueError, match=rf"to load its GGUF file, set source={tmp_path}/model\.Q4_1\.gguf"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(("content", "says"), [("5", "is not a mapping"), ("{", "cannot be read")])
def test_a_damaged_config_is_named(tmp_path, content, says):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json {says}"):
        refuse_code(tmp_path)
