"""The prior learns the same from pictures and cached codes, on any ranks, and refuses what it must."""

from itertools import islice
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import ImageDataConfig
from mmlab.keyed import uniform
from mmlab.model.code_sampling import CodeSampler, sample_codes
from mmlab.model.config import CodeSamplerConfig
from mmlab.training.config import EMAConfig
from mmlab.training.ema import EMA
from tests.model.tiny_priors import CODES, NAMES, SIDE, prior_model
from tests.stage.tiny_codes import SIZE, code_data, code_stage, make_codes, make_maps
from tests.stage.tiny_stage import fit


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_maps(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cached(tmp_path_factory, pictures):
    """Codes of pictures and of maps, by a model that reads both."""
    return make_codes(tmp_path_factory.mktemp("codes"), prior_model("map"), pictures, flip=True)


def batches(stage: Any, index: Any, count: int = 2, **options: Any) -> list[dict[str, Any]]:
    data = code_data(stage, index, **options)
    data.plan(count)
    micro = count * data.accumulation(1)
    return [stage.on_before_batch_transfer(batch, 0) for batch in islice(data.train_dataloader(), micro)]


@pytest.mark.parametrize("kind", ["none", "class", "text", "map"])
@torch.no_grad()
def test_cached_codes_give_the_loss_of_the_pictures(pictures, cached, kind, tokenizer_folder):
    stage = code_stage(prior_model(kind, tokenizer_folder), pkeep=0.7)
    pairs = zip(batches(stage, pictures), batches(stage, cached, latents=True), strict=True)
    for of_pictures, of_codes in pairs:
        assert "pixel_values" not in of_codes and of_codes["seeds"] == of_pictures["seeds"]
        assert torch.equal(stage.codes(of_codes), stage.codes(of_pictures))
        expected = stage.loss(of_pictures, 0.5, 0.7)
        torch.testing.assert_close(stage.loss(of_codes, 0.5, 0.7), expected, rtol=0, atol=0)
        assert expected.shape == (8,) and expected.dtype == torch.float32
    unflipped = batches(stage, pictures, flip=False)[0]
    assert not torch.equal(stage.codes(unflipped), stage.codes(batches(stage, pictures)[0]))


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_code(pictures):
    stage = code_stage()
    batch = batches(stage, pictures)[0]
    codes = stage.codes(batch)
    assert torch.equal(codes, stage.model.first_stage.codes(batch["pixel_values"] / 127.5 - 1).flatten(1))
    logits = stage.model(codes, stage.model.conditioner({"labels": batch["labels"]}))
    expected = [F.cross_entropy(rows, wanted) for rows, wanted in zip(logits, codes, strict=True)]
    torch.testing.assert_close(stage.loss(batch, 0.0, 1.0), torch.stack(expected))


def test_a_share_of_the_codes_is_read_as_others_and_all_are_learned(pictures, monkeypatch):
    stage = code_stage()
    codes, seeds = torch.arange(CODES).repeat(300, 1), list(range(300))
    assert stage.read(codes, seeds, 1.0) is codes
    read = stage.read(codes, seeds, 0.6)
    # A random code is the code itself once in 16 times.
    assert (read == codes).double().mean().item() == pytest.approx(0.6 + 0.4 / CODES, abs=0.02)
    assert torch.equal(stage.read(codes[7:9], seeds[7:9], 0.6), read[7:9]), "keyed by the sample"
    other = read[read != codes]
    assert other.bincount(minlength=CODES).double().std() < 0.15 * other.bincount().double().mean()

    batch, targets = batches(stage, pictures)[0], []
    original = F.cross_entropy

    def noted(logits: Any, wanted: Any, **options: Any) -> Any:
        targets.append(wanted)
        return original(logits, wanted, **options)

    monkeypatch.setattr("mmlab.stage.code_prior.F.cross_entropy", noted)
    stage.loss(batch, 0.0, 0.0)
    assert torch.equal(targets[0], stage.codes(batch))


def test_conditions_are_dropped_as_often_as_the_conditioner_says(pictures):
    stage, dropped = code_stage(), []
    stage.model.conditioner.register_forward_pre_hook(lambda _, args: dropped.extend(args[1].tolist()))
    batch = batches(stage, pictures)[0]
    row = {name: batch[name][:1] for name in ("pixel_values", "labels")}
    many = {name: value.repeat(200, *[1] * (value.dim() - 1)) for name, value in row.items()}
    seeds = list(range(200))
    with torch.no_grad():
        stage.loss({**many, "seeds": seeds}, 0.3, 1.0)
    assert dropped == (uniform(seeds, "drop condition") < 0.3).tolist() and 30 < sum(dropped) < 90
    stage.loss({**batch, "seeds": seeds[:8]}, 1.0, 1.0).mean().backward()
    assert stage.model.conditioner.embedding.weight.grad.abs().sum(1).nonzero().tolist() == [[len(NAMES)]]


@torch.no_grad()
def test_validation_gives_every_condition_and_reads_every_code(pictures):
    stage, logged = code_stage(pkeep=0.5), {}
    stage.model.conditioner.dropout = 0.5
    stage.log = lambda name, value, **_: logged.update({name: value})
    batch = batches(stage, pictures)[0]
    stage.eval().validation_step(batch, 0)
    torch.testing.assert_close(logged["val/loss"], stage.loss(batch, 0.0, 1.0).mean())
    assert logged["val/loss"] not in (stage.loss(batch, 0.5, 1.0).mean(), stage.loss(batch, 0.0, 0.5).mean())


@pytest.mark.parametrize(("latents", "devices"), [(False, 1), (True, 1), (True, 2)])
def test_micro_batches_ranks_and_caches_learn_what_one_learns(pictures, cached, latents, devices):
    def train(latents: bool, micro_batch: int, devices: int) -> tuple[dict[str, torch.Tensor], list[float]]:
        stage = code_stage(pkeep=0.8)
        data = code_data(stage, cached if latents else pictures, latents, micro_batch=micro_batch)
        watch = fit(stage, data, 3, devices)
        return stage.model.state_dict(), watch.losses

    before = prior_model("class").state_dict()
    expected, losses = train(False, 8, 1)
    found, found_losses = train(latents, 2, devices)
    if devices == 1:  # the losses of forked ranks stay with them
        assert found_losses == pytest.approx(losses, rel=1e-4) and len(set(losses)) == 3
    for name, value in expected.items():
        if name.endswith("key.bias"):
            continue  # softmax does not see it: its gradient is rounding, which Adam makes as large as any
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        if name.endswith("weight"):
            assert torch.equal(value, before[name]) is name.startswith("first_stage"), name


def test_it_learns_to_write_the_pictures_of_a_class(pictures, cached):
    """Six pictures of a class are learned by heart; with guidance their codes come back."""
    stage = code_stage()
    ema = EMA(EMAConfig(decay=0.5))
    watch = fit(stage, code_data(stage, cached, latents=True, flip=False), 60, callbacks=[ema])
    assert watch.losses[-1] < 0.5 * watch.losses[0]
    assert float(stage.trainer.callback_metrics["val/loss"]) < 0.5 * watch.losses[0]
    average = {name: value for name, value in ema.average.items() if name.startswith("prior")}
    assert average and all(torch.equal(stage.model.state_dict()[name], value) for name, value in average.items())
    known = stage.codes(batches(stage, pictures, 2, flip=False)[0] | {})
    labels = torch.arange(3).repeat(4)
    condition = stage.model.condition({"labels": labels})
    null = stage.model.condition({"labels": labels}, torch.ones(12, dtype=torch.bool))
    numbers = uniform(list(range(12)), "codes", (SIDE, SIDE))
    made = sample_codes(
        stage.model.eval().prior,
        CodeSampler(CodeSamplerConfig(temperature=0.7, guidance=1.5)),
        numbers,
        condition,
        null,
    ).flatten(1)
    apart = (made[:, None] != known[None]).double().mean(2).amin(1)
    assert apart.mean() < 0.35, "random codes differ in 94 % of the places"


def test_a_checkpoint_holds_what_learns():
    for kind, learns in (("none", {"prior"}), ("map", {"prior", "conditioner"})):
        stage = code_stage(prior_model(kind))
        checkpoint = {"state_dict": stage.state_dict()}
        stage.on_save_checkpoint(checkpoint)
        assert {name.split(".")[1] for name in checkpoint["state_dict"]} == learns


def untrained(part: str) -> Any:
    model: Any = prior_model("map")
    getattr(model, part).untrained = True
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: code_stage(untrained("first_stage")), "The first stage is untrained, so its codes are meaningless"),
        (lambda: code_stage(untrained("map_stage")), "The first stage of the maps is untrained"),
        (lambda: code_stage(trainable=["prior", "first_stage"]), "'first_stage', which is frozen .* stage=autoencoder"),
        (lambda: code_stage(prior_model("map"), trainable=["map_stage"]), "'map_stage', which is frozen here"),
        (lambda: code_stage(trainable=["pior"]), "Did you mean 'prior'"),
        (lambda: code_stage(trainable=["prior"]), r"conditioner has random weights .*\[prior, conditioner\]"),
        (lambda: code_stage(pkeep=1.5), "'pkeep' must be at most 1, not 1.5"),
        (lambda: code_stage().collate(ImageDataConfig(size=SIZE + 4)), "5 x 5 codes, and .*=5, or data.size=16"),
        (
            lambda: code_stage().collate(ImageDataConfig(size=SIZE + 1, latents=True)),
            "must divide by the first stage's factor 4",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_codes_of_another_first_stage_are_refused(pictures, cached, tmp_path):
    for part in ("first_stage", "map_stage"):
        other: Any = prior_model("map")
        with torch.no_grad():
            getattr(other, part).quant_conv.weight.mul_(1.1)
        name = part.replace("_", " ")
        with pytest.raises(DataError, match=rf"the codes of .* were made by the {name} .* encode the images again"):
            batches(code_stage(other), cached, latents=True)
    with pytest.raises(DataError, match=f"with data.size={SIZE} data.aspect=crop, but .* data.aspect=stretch: set"):
        batches(code_stage(), cached, latents=True, aspect="stretch")
    plain = make_codes(tmp_path, prior_model("class"), pictures)
    with pytest.raises(DataError, match="holds no codes of mirrored images; encode with --flip"):
        batches(code_stage(), plain, latents=True)
    with pytest.raises(DataError, match="were made by the map stage None, but this model's is"):
        batches(code_stage(prior_model("map")), plain, latents=True, flip=False)
    with pytest.raises(DataError, match="holds no codes; make them with `mmlab shards encode`"):
        batches(code_stage(), pictures, latents=True)
    with pytest.raises(DataError, match=r"holds latents or codes, not images; set data\.latents=true"):
        batches(code_stage(), cached)
