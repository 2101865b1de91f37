"""Of the checkpoints of a folder, the newest that is intact is found, and the others are removed."""

import json

import pytest

from mmlab.config.errors import RunError
from mmlab.training import checkpoint_folder as checkpoints
from tests.training.tiny_checkpoints import damage, save


@pytest.mark.parametrize("how", ["flip", "truncate", "zero", "empty", "delete"])
@pytest.mark.parametrize("file", [checkpoints.STATE, checkpoints.MANIFEST])
def test_damage_is_found_and_the_one_before_is_taken(tmp_path, file, how):
    old, new = save(tmp_path, 2), save(tmp_path, 10)
    assert checkpoints.newest_whole(tmp_path, pytest.fail) == new
    damage(new / file, how)
    said: list[str] = []
    assert checkpoints.newest_whole(tmp_path, said.append) == old
    assert len(said) == 1 and str(new) in said[0] and file in said[0]


def test_sizes_are_compared_without_reading_the_files(tmp_path):
    target = save(tmp_path, 1)
    damage(target / checkpoints.STATE, "flip")
    assert checkpoints.find_fault(target, hashes=False) is None and checkpoints.find_fault(target) is not None
    damage(target / checkpoints.STATE, "truncate")
    assert checkpoints.find_fault(target, hashes=False) is not None


def test_each_byte_of_the_manifest_counts(tmp_path):
    target = save(tmp_path, 1)
    whole = (target / checkpoints.MANIFEST).read_bytes()
    facts = whole[whole.index(b'"files"') :]
    for at in range(len(whole) - len(facts), len(whole)):
        if chr(whole[at]).isspace():
            continue
        (target / checkpoints.MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert checkpoints.find_fault(target) is not None, whole[:at]


def test_without_a_whole_one_the_run_does_not_start_over_silently(tmp_path):
    assert checkpoints.newest_whole(tmp_path / "none", pytest.fail) is None
    for number in (1, 2):
        damage(save(tmp_path, number) / checkpoints.STATE, "delete")
    with pytest.raises(RunError, match=r"step-2 is damaged: state.pt is missing.*step-1 .*run\.fresh=true"):
        checkpoints.newest_whole(tmp_path, lambda said: None)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    whole = save(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    assert checkpoints.newest_whole(tmp_path, lambda said: None) == whole
    (tmp_path / "step-x").mkdir()
    assert list(checkpoints.steps(tmp_path)) == [2, 1]


def test_a_manifest_that_names_another_folders_file_is_refused(tmp_path):
    target = save(tmp_path, 1)
    text = (target / checkpoints.MANIFEST).read_text()
    (target / checkpoints.MANIFEST).write_text(text.replace('"state.pt"', '"../step-1/state.pt"'))
    assert checkpoints.find_fault(target) is not None


def test_pruning_keeps_the_newest_and_waits_for_a_whole_one(tmp_path):
    for number in (1, 2, 3, 20):
        save(tmp_path, number)
    damage(tmp_path / "step-20" / checkpoints.STATE, "flip")
    checkpoints.prune(tmp_path, 2)
    assert list(checkpoints.steps(tmp_path)) == [20, 3, 2, 1]
    save(tmp_path, 20)
    checkpoints.prune(tmp_path, 2)
    assert list(checkpoints.steps(tmp_path)) == [20, 3]
    assert not list(tmp_path.glob(".*"))


def test_pruning_does_not_read_a_sharded_checkpoint(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number)
    newest = tmp_path / "step-3"
    shard = newest / f"{checkpoints.SHARD}0-of-1.safetensors"
    shard.write_bytes(b"rows")
    manifest = json.loads((newest / checkpoints.MANIFEST).read_text())
    manifest["files"][shard.name] = {"size": 5, "sha256": "not compared"}
    (newest / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    checkpoints.prune(tmp_path, 2)
    assert list(checkpoints.steps(tmp_path)) == [3, 2, 1]  # a byte is missing
    shard.write_bytes(b"rows.")
    checkpoints.prune(tmp_path, 2)
    assert list(checkpoints.steps(tmp_path)) == [3, 2]
