"""A cache of codes: two bytes a code, what made it, and what one cannot ask for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter, write_shards
from mmlab.model.first_stage import to_signed
from mmlab.stage.assembly import restore
from mmlab.stage.latent_cache import codes
from mmlab.verbs.shards import main
from mmlab.weights import content_hash
from tests.evaluate.tiny_scores import first_stage_run
from tests.model import tiny_autoencoders as tiny
from tests.stage.tiny_codes import SIZE, make_maps
from tests.tiny_files import png
from tests.verbs.tiny_prior_runs import prior_run, vq_run

SPEC = ImageSpec(SIZE, "crop")


def read(root: Path) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    """Record and tensors of each sample."""
    index = ShardIndex.open(root)
    members = [index.read(i) for i in range(len(index))]
    return [(json.loads(one["json"]), load(one["safetensors"])) for one in members]


@pytest.mark.parametrize("batch_size", [2, 64])
@torch.no_grad()
def test_a_cache_is_the_codes_of_each_picture_and_its_mirror_image(tmp_path, batch_size):
    index, stage, maps = make_maps(tmp_path, 5), tiny.vq().eval(), tiny.vq(codes=9).eval()
    _, tally = write_shards(codes(stage, index, SPEC, True, batch_size, map_stage=maps), tmp_path / "codes", quiet=True)
    assert tally.counts() == {"rows": 5, "samples": 5}
    for i, (record, stored) in enumerate(read(tmp_path / "codes")):
        original = index.read(i)
        assert set(stored) == {"codes", "codes_flipped", "map_codes", "map_codes_flipped"}
        for first_stage, name, member in ((stage, "codes", "png"), (maps, "map_codes", "map.png")):
            picture = to_signed(decode_image(original[member], SPEC))[None]
            for turned, ending in ((picture, ""), (picture.flip(-1), "_flipped")):
                found = stored[name + ending]
                assert found.dtype == torch.uint16 and found.shape == (4, 4)
                assert torch.equal(found.long(), first_stage.codes(turned)[0])
        assert not torch.equal(stored["codes"].long(), stored["codes_flipped"].long())
        assert record.pop("first_stage") == content_hash(stage) and record.pop("map_stage") == content_hash(maps)
        assert record.pop("encoded_as") == f"data.size={SIZE} data.aspect=crop"
        assert record == json.loads(original["json"]), "class and caption stay"


@torch.no_grad()
def test_large_books_take_four_bytes(tmp_path):
    index, stage = make_maps(tmp_path, 2), tiny.vq(codes=65537).eval()
    write_shards(codes(stage, index, SPEC), tmp_path / "codes", quiet=True)
    stored = read(tmp_path / "codes")[0][1]["codes"]
    picture = decode_image(index.read(0)["png"], SPEC)
    assert stored.dtype == torch.uint32 and torch.equal(stored.long(), stage.codes(to_signed(picture)[None])[0])


def test_pictures_without_a_map_are_lost_only_where_maps_are_asked_for(tmp_path):
    with ShardWriter(tmp_path / "pictures", quiet=True) as writer:
        writer.write("whole", {"png": png(SIZE, SIZE), "map.png": png(SIZE, SIZE)})
        writer.write("alone", {"png": png(SIZE, SIZE)})
    stage = tiny.vq().eval()
    _, tally = write_shards(codes(stage, writer.index, SPEC), tmp_path / "codes", quiet=True)
    assert tally.counts() == {"rows": 2, "samples": 2}
    both = codes(stage, writer.index, SPEC, missing_budget=0.5, map_stage=stage)
    assert write_shards(both, tmp_path / "both", quiet=True)[1].counts() == {"rows": 2, "samples": 1, "unreadable": 1}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    first_stage_run(root / "runs", "kl")
    vq_run(root / "runs")
    vq_run(root / "runs", "vq_maps", seed=1)
    prior_run(root / "runs", "prior")
    make_maps(root, 4, "pictures", size=32)
    return root


def encode(work: Path, run: str, out: str, *options: str) -> int:
    """`mmlab shards encode` in a folder with runs/."""
    return main(["encode", run, str(work / "pictures"), str(work / out), "--runs", str(work / "runs"), *options])


def test_a_first_stage_with_a_codebook_makes_codes(work, capsys):
    assert encode(work, "vq", "direct", "--flip", "--map-run", "vq_maps") == 0
    assert "4 samples in 1 shards" in capsys.readouterr().out
    assert encode(work, "prior", "through", "--flip", "--map-run", "vq_maps") == 0, "a run that started from it"
    assert ShardIndex.open(work / "direct").hash == ShardIndex.open(work / "through").hash
    record, stored = read(work / "direct")[0]
    card = json.loads((work / "runs" / "vq" / "artifacts" / "first_stage" / "card.json").read_text())
    assert record["first_stage"] == card["content_hash"] != record["map_stage"]
    assert stored["codes"].dtype == torch.uint16 and stored["codes"].shape == stored["map_codes"].shape == (4, 4)
    model, _ = restore(work / "runs" / "prior")
    picture = decode_image(ShardIndex.open(work / "pictures").read(0)["png"], SPEC)
    assert torch.equal(stored["codes"].long(), model.codes(picture[None])[0])


def test_latents_are_there_for_who_asks(work):
    assert encode(work, "vq", "latents", "--as", "latents", "--dtype", "float16") == 0
    stored = read(work / "latents")[0][1]
    assert set(stored) == {"mean"} and stored["mean"].dtype == torch.float16
    assert encode(work, "kl", "kl_latents") == 0
    assert set(read(work / "kl_latents")[0][1]) == {"mean", "logvar"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["kl", "x", "--as", "codes"], "has no codebook, so it has no codes; encode --as latents."),
        (["kl", "x", "--map-run", "vq"], "--map-run applies only to codes, and this encodes latents"),
        (["vq", "x", "--dtype", "float16"], "--dtype=float16 applies only to latents, and this encodes codes"),
        (["vq", "x", "--as", "code"], "Did you mean 'codes'?"),
        (["vq", "x", "--map-run", "vq_map"], "Did you mean 'vq_maps'?"),
        (["vq", "x", "--map-run", "kl"], "KLAutoencoder has no codebook, so it has no codes"),
    ],
)
def test_mistakes_are_one_sentence(work, capsys, argv, says):
    assert encode(work, *argv) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not (work / "x").exists()
