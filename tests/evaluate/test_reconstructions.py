"""Scores of reconstructions, and the linear code that they are compared with."""

from types import SimpleNamespace

import pytest
import torch

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.pictures import reconstructions
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.reconstructions import (
    EQUAL,
    LinearCode,
    reconstruct,
    reconstruction_sheet,
    score_reconstructions,
)
from mmlab.model.fidelity import psnr
from mmlab.model.first_stage import to_signed
from mmlab.model.quantizer import usage
from tests.evaluate.tiny_scores import SIDE, Quadrants, Unshuffle, make_noise
from tests.model import tiny_autoencoders as tiny
from tests.tiny_files import png
from tests.tiny_shapes import make_records

SPEC = ImageSpec(SIDE, "crop")


class Difference(torch.nn.Module):
    label = "a difference"

    def forward(self, x, y):
        return (x - y).abs().mean((1, 2, 3))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[PictureSet, PictureSet]:
    root = tmp_path_factory.mktemp("sets")
    make_noise(root / "val", 30, 1)
    make_noise(root / "train", 260, 2)
    return PictureSet(root / "val", SPEC), PictureSet(root / "train", SPEC)


def test_perfect_reconstructions_score_best(sets):
    model = SimpleNamespace(first_stage=Unshuffle(), perceptual=Difference())
    scores = score_reconstructions(model, sets[0], [Quadrants()])
    assert scores["psnr"] == EQUAL and scores["ssim"] == pytest.approx(1, abs=1e-5)
    assert scores["perceptual"] == 0 and scores["perceptual_distance"] == "a difference"
    assert scores["rfid"] == pytest.approx(0, abs=1e-4) and scores["features"]["network"] == "quadrants"
    assert scores["pictures"]["pictures"] == 30 and "bicubic with antialiasing" in scores["pictures"]["form"]


def test_the_scores_are_means_over_the_pictures(sets):
    first_stage = Unshuffle(blur=0.8)
    model = SimpleNamespace(first_stage=first_stage)
    scores = score_reconstructions(model, sets[0], [Quadrants()], batch_size=7)
    originals = torch.stack([sets[0].picture(n) for n in range(30)])
    back = reconstruct(first_stage, originals)
    assert back.dtype == torch.uint8
    expected = psnr(to_signed(originals), to_signed(back))
    assert scores["psnr"] == pytest.approx(float(expected.mean()), abs=1e-4)
    assert scores["psnr"] < 40 and 0 < scores["ssim"] < 1 and scores["rfid"] > 0.01
    assert "perceptual" not in scores and "biased" in scores["caution"]
    again = score_reconstructions(model, sets[0], batch_size=30)
    assert again["psnr"] == pytest.approx(scores["psnr"], abs=1e-4) and "rfid" not in again


def test_a_linear_code_of_as_many_numbers_is_compared(sets):
    pictures, train = sets
    scores = score_reconstructions(SimpleNamespace(first_stage=Unshuffle()), pictures, train=train)
    assert scores["linear_values"] == 12 * (SIDE // 2) ** 2 and scores["linear_pictures"] == 260
    # Pictures of 4 x 4 random colors lie in a space of 48 directions: 192 numbers keep all of it but the rounding.
    assert scores["linear_psnr"] > 35
    rows = torch.stack([train.picture(n) for n in range(260)])
    held_out = torch.stack([pictures.picture(n) for n in range(30)])
    expected = psnr(to_signed(held_out), to_signed(LinearCode(rows, 192)(held_out))).clamp(max=EQUAL).mean()
    assert scores["linear_psnr"] == pytest.approx(float(expected), abs=1e-3)


def test_too_few_training_pictures_for_the_linear_code(sets):
    few = PictureSet(sets[1].index.root, SPEC, 100)
    first_stage = Unshuffle()
    first_stage.encode = lambda x: pytest.fail("it is known before any picture is encoded")
    with pytest.raises(ConfigError, match="192 numbers needs more than 192 training images; there are 100"):
        score_reconstructions(SimpleNamespace(first_stage=first_stage), sets[0], train=few)


@pytest.mark.parametrize("fits", [192, 193])
def test_a_linear_code_that_does_not_fit_in_memory_is_left_out(sets, monkeypatch, fits):
    monkeypatch.setattr(reconstructions, "LINEAR_BYTES", fits * 4 * 3 * SIDE**2)
    scores = score_reconstructions(SimpleNamespace(first_stage=Unshuffle()), sets[0], train=sets[1])
    assert scores["psnr"] == EQUAL
    if fits > 192:
        assert scores["linear_pictures"] == fits and "linear_left_out" not in scores
    else:
        assert "needs more than 192 images, but" in scores["linear_left_out"] and "linear_psnr" not in scores
        assert scores["linear_left_out"].endswith("GiB hold 192 of 8 px")


def test_the_sheet_shows_pairs(sets):
    sheet = reconstruction_sheet(Unshuffle(), sets[0], cells=12)
    assert sheet.mode == "RGB" and sheet.width > 1500


def test_the_sheet_has_the_budget_of_the_set(tmp_path):
    files = [png() if n % 2 else png()[:40] for n in range(28)]
    some = PictureSet(make_records(tmp_path / "some", [{}] * 28, files).root, SPEC, budget=0.6)
    list(some.batches(4, "x"))
    assert reconstruction_sheet(Unshuffle(), some, cells=28).width > 1500


def test_a_set_of_pictures(sets, tmp_path):
    some = PictureSet(sets[1].index.root, SPEC, 10)
    assert len(some) == 10 and some.places[0] == 0 and some.places[-1] == 259
    assert some.key(9) == "train259" and some.sample(9).record["caption"] == "number 259"
    assert [len(batch) for batch in some.batches(4, "x")] == [4, 4, 2]
    assert torch.equal(torch.cat(list(some.batches(4, "x")))[9], some.picture(9))
    make_records(tmp_path / "texts", [{"caption": "no picture"}], [None])
    texts = PictureSet(tmp_path / "texts", SPEC)
    with pytest.raises(DataError, match=r"no images that can be used: .* has no image; scores need the images"):
        list(texts.batches(4, "x"))
    with pytest.raises(DataError, match="no images that can be used"):
        texts.first()


def test_images_that_cannot_be_decoded_are_left_out(tmp_path):
    files = [png(), png(color="blue")[:40], png(color="green")]
    some = PictureSet(make_records(tmp_path / "some", [{}] * 3, files).root, SPEC)
    batches = list(some.batches(1, "x"))
    assert [len(batch) for batch in batches] == [1, 1] and [some.key(n) for n in range(len(some))] == ["s0000", "s0002"]
    assert torch.equal(batches[1][0], some.picture(1)) and torch.equal(batches[0][0], some.first())
    assert some.bad.reasons == {"decode": 1} and "s0001" in some.bad.errors


@torch.no_grad()
def test_a_codebook_is_scored_by_its_use(sets):
    stage = tiny.vq().eval()
    spec = ImageSpec(16, "crop")
    scores = score_reconstructions(SimpleNamespace(first_stage=stage), PictureSet(sets[0].index.root, spec))
    pictures = PictureSet(sets[0].index.root, spec)
    codes = stage.codes(to_signed(torch.stack([pictures.picture(n) for n in range(30)])))
    counts = codes.flatten().bincount(minlength=16)
    assert (scores["code_use"], scores["perplexity"]) == pytest.approx(usage(counts))
    assert 0 < scores["code_use"] <= 1 and "code_use" not in score_reconstructions(
        SimpleNamespace(first_stage=Unshuffle()), sets[0]
    )


def drawn(count: int, rank: int, seed: int, side: int = 4) -> torch.Tensor:
    """Images in a space of `rank` directions around gray; the directions are the same for every seed."""
    axes = torch.randn(rank, 3 * side * side, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(count, rank, generator=torch.Generator().manual_seed(seed)) * 12
    return (128 + weights @ axes).round().clamp(0, 255).to(torch.uint8).view(count, 3, side, side)


def error(code: LinearCode, pictures: torch.Tensor) -> float:
    return float((code(pictures).float() - pictures.float()).square().mean())


@pytest.mark.parametrize("count", [30, 200])  # fewer pictures than values, and more
def test_it_is_the_best_linear_code(count):
    train, held_out = drawn(count, 5, 1), drawn(20, 5, 2)
    assert error(LinearCode(train, 5), held_out) < 1.0, "five directions span the set: rounding remains"
    code = LinearCode(train, 3)
    flat = train.flatten(1).double()
    rest = torch.linalg.svdvals(flat - flat.mean(0))[3:].square().sum() / flat.numel()
    assert error(code, train) == pytest.approx(float(rest), rel=0.02), "what the three largest directions leave"
    assert torch.allclose(code.axes_DK.T @ code.axes_DK, torch.eye(3), atol=1e-5)
    assert code(held_out).dtype == torch.uint8 and code(held_out).shape == held_out.shape


def test_more_values_than_pictures_is_refused():
    with pytest.raises(ConfigError, match="more than 30 training images; there are 30"):
        LinearCode(drawn(30, 5, 1), 30)
