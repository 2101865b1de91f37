"""A cache of latents: what the first stage says of each picture, and which first stage it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from mmlab.config.errors import DataError, RunError
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter, write_shards
from mmlab.diffusion.config import DiffusionConfig
from mmlab.diffusion.process import Diffusion
from mmlab.model.first_stage import to_signed
from mmlab.stage.assembly import restore
from mmlab.stage.config import LatentDiffusionConfig
from mmlab.stage.latent_cache import latents
from mmlab.stage.latent_diffusion import LatentDiffusion
from mmlab.verbs.shards import main
from mmlab.weights import content_hash
from tests.evaluate.tiny_scores import Unshuffle, contrastive_run, diffusion_run, first_stage_run, make_run
from tests.stage.tiny_diffusion import SIZE, TinyFirstStage, image_data, make_pictures
from tests.stage.tiny_stage import optim
from tests.tiny_files import png

SPEC = ImageSpec(SIZE, "crop")


def first_stage() -> TinyFirstStage:
    torch.manual_seed(0)
    return TinyFirstStage().eval()


def encode(index, out, stage=None, **options):
    made, counts = write_shards(latents(stage or first_stage(), index, SPEC, **options), out, 5, quiet=True)
    return {str(key): made.read(i) for i, key in enumerate(made.keys)}, counts.counts()


@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_cache_is_the_posterior_of_each_picture(tmp_path, batch_size):
    index = make_pictures(tmp_path, 7)
    found, counts = encode(index, tmp_path / "latents", batch_size=batch_size)
    assert counts == {"rows": 7, "samples": 7} and list(found) == [str(key) for key in index.keys]
    for i, members in enumerate(found.values()):
        original = index.read(i)
        with torch.no_grad():
            posterior = first_stage().encode(to_signed(decode_image(original["png"], SPEC))[None])
        assert posterior.logvar is not None
        stored = load(members["safetensors"])
        assert set(stored) == {"mean", "logvar"} and set(members) == {"json", "safetensors"}
        assert stored["mean"].dtype == torch.float32 and stored["mean"].shape == (2, SIZE // 2, SIZE // 2)
        assert torch.allclose(stored["mean"], posterior.mean[0], atol=1e-6)
        assert torch.allclose(stored["logvar"], posterior.logvar[0], atol=1e-6)
        record = json.loads(members["json"])
        assert record.pop("first_stage") == content_hash(first_stage())
        assert record.pop("encoded_as") == f"data.size={SIZE} data.aspect=crop"
        assert record == json.loads(original["json"]), "class and caption stay"


def test_mirror_images_are_encoded_too(tmp_path):
    index = make_pictures(tmp_path, 3)
    found, _ = encode(index, tmp_path / "latents", flip=True)
    stored = load(found["s1"]["safetensors"])
    assert set(stored) == {"mean", "logvar", "mean_flipped", "logvar_flipped"}
    turned = decode_image(index.read(1)["png"], SPEC).flip(-1)
    with torch.no_grad():
        assert torch.allclose(stored["mean_flipped"], first_stage().encode(to_signed(turned)[None]).mean[0], atol=1e-6)
    assert not torch.allclose(stored["mean_flipped"], stored["mean"], atol=1e-2)


def test_a_point_has_no_variance_and_half_precision_half_the_size(tmp_path):
    index = make_pictures(tmp_path, 2)
    found, _ = encode(index, tmp_path / "latents", Unshuffle(), dtype="float16")
    stored = load(found["s0"]["safetensors"])
    assert set(stored) == {"mean"} and stored["mean"].dtype == torch.float16


def test_text_and_class_members_stay(tmp_path):
    with ShardWriter(tmp_path / "pictures", quiet=True) as writer:
        writer.write("a", {"png": png(SIZE, SIZE), "txt": "a caption", "cls": "3"})
    found, _ = encode(writer.index, tmp_path / "latents")
    assert found["a"]["cls"] == b"3" and json.loads(found["a"]["json"])["caption"] == "a caption"


def test_the_fingerprint_tells_first_stages_apart(tmp_path):
    index = make_pictures(tmp_path, 1)
    other = first_stage()
    other.set_statistics(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]))
    made_by = [
        json.loads(encode(index, tmp_path / f"{i}", stage)[0]["s0"]["json"])["first_stage"]
        for i, stage in enumerate((first_stage(), first_stage(), other))
    ]
    assert made_by[0] == made_by[1] != made_by[2]


def test_unreadable_pictures_are_counted_within_the_budget(tmp_path):
    with ShardWriter(tmp_path / "pictures", quiet=True) as writer:
        writer.write("good", {"png": png(SIZE, SIZE)})
        writer.write("broken", {"png": b"\x89PNG\r\n\x1a\nbroken"})
        writer.write("none", {"json": {"caption": "text alone"}})
        writer.write("last", {"png": png(SIZE, SIZE)})
    with pytest.raises(DataError, match=r"sample broken cannot be encoded.*allows 0"):
        encode(writer.index, tmp_path / "strict")
    assert not (tmp_path / "strict").exists()
    found, counts = encode(writer.index, tmp_path / "latents", missing_budget=0.5)
    assert list(found) == ["good", "last"] and counts == {"rows": 4, "samples": 2, "unreadable": 2}


def test_a_latent_that_the_type_does_not_hold(tmp_path):
    index = make_pictures(tmp_path, 1)
    stage = first_stage()
    with torch.no_grad():
        stage.there.weight.mul_(1e6)
    with pytest.raises(RunError, match=r"not finite in float16.*--dtype float32"):
        encode(index, tmp_path / "half", stage, dtype="float16")
    with torch.no_grad():
        stage.there.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite in float32"):
        encode(index, tmp_path / "broken", stage)


def latents_of(work: Path, run: str, source: str, out: str, *options: str) -> int:
    """`mmlab shards encode` in a folder with runs/."""
    return main(["encode", str(run), str(work / source), str(work / out), "--runs", str(work / "runs"), *options])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("work")
    first_stage_run(root / "runs")
    diffusion_run(root / "runs")
    make_pictures(root, 5, "pictures")
    return root


def test_a_run_and_what_started_from_it_make_one_cache(work, capsys):
    assert latents_of(work, "first_stage", "pictures", "direct", "--flip", "--dtype", "float16") == 0
    assert "5 samples in 1 shards" in capsys.readouterr().out
    assert latents_of(work, "denoiser", "pictures", "through", "--flip", "--dtype", "float16") == 0
    direct, through = (ShardIndex.open(work / name) for name in ("direct", "through"))
    assert direct.hash == through.hash
    members = direct.read(0)
    card = json.loads((work / "runs" / "first_stage" / "artifacts" / "first_stage" / "card.json").read_text())
    assert json.loads(members["json"])["first_stage"] == card["content_hash"]
    stored = load(members["safetensors"])
    assert set(stored) == {"mean", "logvar", "mean_flipped", "logvar_flipped"}
    assert stored["mean"].shape == (4, 4, 4) and stored["mean"].dtype == torch.float16


def test_the_stage_accepts_the_cache(work):
    assert latents_of(work, "first_stage", "pictures", "cache", "--flip") == 0
    model, _ = restore(work / "runs" / "denoiser")
    stage = LatentDiffusion(
        LatentDiffusionConfig(trainable=["denoiser", "conditioner"]), model, optim(), Diffusion(DiffusionConfig())
    )
    data = image_data(stage, ShardIndex.open(work / "cache"), latents=True, global_batch=4, micro_batch=4)
    data.plan(1)
    batch = next(iter(data.train_dataloader()))
    assert batch["mean"].shape == (4, 4, 4, 4) and batch["labels"].shape == (4,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["firststage", "pictures", "x"], "Did you mean 'first_stage'?"),
        (["first_stage", "picture", "x"], "pictures'?"),
        (["first_stage", "pictures", "x", "--dtype", "float61"], "Did you mean 'float16'?"),
        (["first_stage", "pictures", "x", "--flipp"], "Did you mean '--flip'?"),
        (["first_stage", "pictures", "direct"], "--overwrite"),
        (["first_stage", "pictures", "x", "--batch-size", "-1"], "--batch-size: it must be a whole number of"),
        (["first_stage", "pictures", "x", "--batch-size", "0"], "at least 1, not 0"),
        (["first_stage", "pictures", "x", "--batch-size", "many"], "at least 1, not many"),
        (["pixels", "pictures", "x"], "its latents are the images themselves"),
        (["eye", "pictures", "x"], "has no first stage"),
    ],
)
def test_mistakes_are_one_sentence(work, capsys, tokenizer_folder, argv, message):
    make = {"pixels": lambda: pixel_run(work / "runs"), "eye": lambda: contrastive_run(work / "runs", tokenizer_folder)}
    make.get(argv[0], lambda: None)()
    (work / "direct").mkdir(exist_ok=True)
    (work / "direct" / "held.tar").touch()
    run, source, out, *options = argv
    capsys.readouterr()
    assert latents_of(work, run, source, out, *options) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1


def pixel_run(root: Path) -> Path:
    """A run of diffusion in pixels."""
    overrides = ["model=diffusion", "data=emoji", "stage=latent_diffusion", "process=cosine_v", "data.size=8"]
    small = ["model/denoiser=dit_tiny", "model.denoiser={depth: 1, width: 16, heads: 2}"]
    return make_run(root, "pixels", [*overrides, *small], ["denoiser"])
