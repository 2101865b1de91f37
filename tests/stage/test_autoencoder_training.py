"""The autoencoder stage: who learns from what, when, and what the run leaves behind."""

import copy
import json
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.data.config import ImageDataConfig
from mmlab.keyed import normal
from mmlab.model.autoencoder import AutoencoderModel
from mmlab.model.config import LPIPSConfig, PatchDiscriminatorConfig
from mmlab.model.discriminator import PatchDiscriminator
from mmlab.model.fidelity import psnr, ssim
from mmlab.model.first_stage import Identity, to_signed
from mmlab.model.perceptual import LPIPS, StandIn
from mmlab.model.quantizer import usage
from mmlab.runs.check import check_trainable
from mmlab.stage.assembly import build_stage
from mmlab.stage.autoencoder_training import AutoencoderTraining
from mmlab.stage.config import AutoencoderTrainingConfig
from mmlab.training.artifacts import save_parts
from mmlab.training.filling import fill_parts
from mmlab.training.trainable import parts_of
from tests.stage.tiny_adversarial import PARTS, data_of, model, stage, train
from tests.stage.tiny_stage import fit, make_stage
from tests.tiny_shapes import make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=5)


class Trainer:
    """As much of a trainer as a step alone asks for."""

    def __init__(self, step: int, world_size: int = 1):
        self.global_step, self.world_size = step, world_size


def at(module: AutoencoderTraining, step: int = 0, world_size: int = 1) -> Any:
    module._trainer = Trainer(step, world_size)  # type: ignore[assignment]
    return module.train()


def batch(count: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"pixel_values": pixels, "seeds": list(range(10, 10 + count))}


def gradients(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("kl", {"kl_weight": 1e-2}), ("vq", {"reduction": "mean", "codebook_weight": 0.9}), ("vq", {"pixel": "l2"})],
)
def test_one_backward_is_the_two_published_ones(kind, options):
    """Autoencoder: its loss with the discriminator fixed. Discriminator: the hinge loss with pictures fixed."""
    module = at(stage(kind, adversarial_weight=0.6, perceptual_weight=0.7, **options))
    apart = copy.deepcopy(module.model)
    module.training_step(batch(), 0).backward()

    x = to_signed(batch()["pixel_values"])
    first, judge = apart.first_stage, apart.discriminator
    posterior = first.encode(x)
    z = posterior.mean
    if posterior.logvar is not None:
        z = z + (posterior.logvar / 2).exp() * normal(batch()["seeds"], z.shape[1:], "posterior")
    made = first.reconstruct(z)
    error = (made.pixels - x).abs() if options.get("pixel") != "l2" else (made.pixels - x).square()
    each = error + 0.7 * apart.perceptual(made.pixels, x).view(-1, 1, 1, 1)
    scale = 1 / len(x) if options.get("reduction") != "mean" else 1 / x.numel()
    latents = 1 / len(x) if options.get("reduction") != "mean" else 1 / z.numel()
    reconstruction = each.sum() * scale
    loss = reconstruction
    if kind == "kl":
        loss = loss + 1e-2 * posterior.kl().sum() * latents
    else:
        assert made.codes is not None
        loss = loss + options.get("codebook_weight", 1.0) * made.codes.loss.sum() * latents
    adversarial = -judge(made.pixels).mean()
    last = first.last_layer
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (reconstruction, adversarial)]
    wanted = torch.autograd.grad(
        loss + 0.6 * (norms[0] / (norms[1] + 1e-4)) * adversarial, list(first.parameters()), retain_graph=True
    )
    for (name, found), gradient in zip(gradients(module.model.first_stage).items(), wanted, strict=True):
        assert found is not None
        # Sums over 768 values round, and that is all there is to the gradient of a key's bias.
        tolerance = 1e-4 * float(gradient.abs().max()) + 4e-6
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    real, fake = judge(x), judge(made.pixels.detach())
    verdict = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    wanted = torch.autograd.grad(verdict, list(judge.parameters()))
    for found, gradient in zip(gradients(module.model.discriminator).values(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"adversarial_start": 5}, {"adversarial_weight": 0}])
def test_before_its_start_the_discriminator_is_not_run(options):
    module = at(stage(**options), step=4)
    ran: list[int] = []
    module.model.discriminator.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        plain = module.reconstruct(to_signed(batch()["pixel_values"]), batch()["seeds"])[2]
    loss = module.training_step(batch(), 0)
    torch.testing.assert_close(loss, plain.reconstruction + plain.penalty)
    loss.backward()
    assert not ran and all(g is None for g in gradients(module.model.discriminator).values())


def test_on_several_ranks_its_gradients_are_there_and_zero():
    module = at(stage(adversarial_start=5), step=4, world_size=2)
    module.training_step(batch(), 0).backward()
    found = gradients(module.model.discriminator).values()
    assert all(g is not None and not g.any() for g in found)
    assert not any(g is None for g in gradients(module.model.first_stage).values())


def test_a_step_with_the_discriminator_has_other_flops():
    early, late = (at(stage(adversarial_start=5), step=step).batch_shape(batch()) for step in (4, 5))
    assert early[:-1] == late[:-1] and early != late


def test_the_latents_are_drawn_by_the_samples_seeds():
    module = at(stage())
    x, seeds = to_signed(batch()["pixel_values"]), batch()["seeds"]
    posterior, z = module.latents(x, seeds)
    order = torch.tensor([2, 0, 3, 1])
    _, again = module.latents(x[order], [seeds[i] for i in order])
    torch.testing.assert_close(again, z[order])
    assert not torch.allclose(z, posterior.mean, atol=0.1)


class Look(L.Callback):
    """What the discriminator and its optimizer state are after each step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.norms: list[int] = []
        self.adam: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        judge = pl_module.model.discriminator
        weights = list(judge.parameters())
        self.weights.append(torch.cat([p.detach().flatten() for p in weights]).clone())
        self.norms.append(int(judge.blocks[3].num_batches_tracked))
        state = trainer.optimizers[0].state
        self.adam.append(max((int(state[p]["step"]) for p in weights if p in state), default=0))


def test_the_optimizer_does_not_touch_the_discriminator_before_its_start(root):
    module, look = stage(adversarial_start=3), Look()
    module.optim.config.weight_decay = 0.1
    before = torch.cat([p.detach().flatten() for p in module.model.discriminator.parameters()]).clone()
    fit(module, data_of(module, root, global_batch=8, micro_batch=4), 5, callbacks=[look])
    assert look.adam == [0, 0, 0, 0, 0, 0, 0, 1, 1, 2], "two micro-batches a step"
    assert torch.equal(look.weights[5], before) and not torch.equal(look.weights[7], before)
    assert look.norms[5] == 0 and look.norms[-1] == 2 * 4, "pictures and reconstructions of each micro-batch, once"


@pytest.mark.parametrize(("kind", "options"), [("kl", {}), ("vq", {"reduction": "mean", "codebook": {"codes": 32}})])
def test_reconstructions_improve(root, tmp_path, kind, options):
    module = stage(kind, lr=4e-3, adversarial_start=30, **options)
    data = data_of(module, root)
    start = copy.deepcopy(module.model.first_stage)
    metrics = train(module, data, tmp_path, 40)
    x = torch.cat([to_signed(b["pixel_values"]) for b in data.spread(5)])
    with torch.no_grad():
        before = psnr(start.decode(start.encode(x).mean).clamp(-1, 1), x).mean().item()
    assert metrics["val/psnr"] > before + 5
    assert metrics["train/loss"] > 0 and 0 < metrics["val/ssim"] < 1


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_validation_is_one_mean_over_all_pictures(root, tmp_path, kind):
    module = stage(kind, kl_weight=1.0, perceptual_weight=0.7)
    data = data_of(module, root, micro_batch=4)  # five pictures: batches of four and one
    metrics = train(module, data, tmp_path, 2)
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    whole = list(loader)
    assert len(whole) == 2
    x = to_signed(torch.cat([b["pixel_values"] for b in whole]))
    with torch.no_grad():
        made, z, terms = module.eval().reconstruct(x, torch.cat([b["seeds"] for b in whole]).tolist())
    pixels, shown = made.pixels.clamp(-1, 1), terms.logged
    std, mean = torch.std_mean(z.transpose(0, 1).flatten(1), 1, correction=0)
    wanted = {
        "psnr": psnr(pixels, x).mean(),
        "ssim": ssim(pixels, x).mean(),
        "perceptual": shown["perceptual"],
        "rec_loss": (made.pixels - x).abs().mean() + 0.7 * shown["perceptual"],
        "latent_mean": mean.abs().mean(),
        "latent_std": std.mean(),
    }
    if kind == "vq":
        assert made.codes is not None
        wanted["code_use"], wanted["perplexity"] = map(
            torch.tensor, usage(made.codes.indices.flatten().bincount(minlength=16))
        )
    for name, value in wanted.items():
        assert metrics[f"val/{name}"] == pytest.approx(float(value), rel=1e-4), name


@pytest.mark.parametrize(("kind", "val"), [("kl", True), ("vq", True), ("kl", False)])
def test_the_artifact_holds_the_statistics_of_the_final_weights(root, tmp_path, kind, val):
    module = stage(kind)
    data = data_of(module, root, val=val)
    train(module, data, tmp_path, 4)
    first = module.model.first_stage
    assert first.measured
    batches = list(data.spread(100))
    x = to_signed(torch.cat([b["pixel_values"] for b in batches]))
    assert len(x) == (5 if val else 12)
    with torch.no_grad():
        z = module.eval().latents(x, torch.cat([b["seeds"] for b in batches]).tolist())[1]
    normalized = first.normalized(z).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normalized.mean(1), torch.zeros(len(normalized)), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.std(1, correction=0), torch.ones(len(normalized)))
    save_parts(module.model, PARTS, tmp_path / "run" / "artifacts", {"run": "it"}, {})
    again = model(kind)
    fill_parts(again, [tmp_path / "run"])
    assert again.first_stage.measured
    assert torch.equal(again.first_stage.normalized(z), first.normalized(z))
    card = json.loads((tmp_path / "run" / "artifacts" / "first_stage" / "card.json").read_text())
    assert card["latent_std"] == first.latent_std.tolist()
    # Going on makes other latents.
    onwards = make_stage(AutoencoderTrainingConfig(trainable=PARTS), model(kind), runs=[tmp_path / "run"])
    assert not onwards.model.first_stage.measured
    assert torch.equal(onwards.model.first_stage.last_layer, first.last_layer)


def test_a_checkpoint_holds_what_learns_and_its_buffers():
    module = stage("vq")
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    names = set(checkpoint["state_dict"])
    assert {"model.first_stage.quantizer.uses", "model.first_stage.latent_std"} <= names
    assert "model.discriminator.blocks.3.running_mean" in names
    assert names == {f"model.{part}.{n}" for part in PARTS for n in getattr(module.model, part).state_dict()}


def test_what_the_stage_does_not_do_is_refused():
    with pytest.raises(ConfigError, match=r"stage\.trainable must be \[first_stage, discriminator\]"):
        make_stage(AutoencoderTrainingConfig(trainable=["first_stage"]), model())
    with pytest.raises(ConfigError, match=r"trainable must be"):
        make_stage(AutoencoderTrainingConfig(trainable=[*PARTS, "perceptual"]), model())
    with pytest.raises(ConfigError, match="Identity has no weights to train"):
        AutoencoderModel(Identity(), PatchDiscriminator(PatchDiscriminatorConfig()), StandIn())
    with pytest.raises(ConfigError, match=r"data\.latents=true does not apply"):
        stage().collate(ImageDataConfig(size=16, latents=True))
    with pytest.raises(ConfigError, match=r"data\.size=18 must divide by the first stage's factor 4"):
        stage().collate(ImageDataConfig(size=18))
    with pytest.raises(ConfigError, match=r"data\.size=8 is less than the discriminator's 12"):
        stage().collate(ImageDataConfig(size=8))
    alone = stage(adversarial_weight=0)
    alone.collate(ImageDataConfig(size=8))
    with pytest.raises(ConfigError, match=r"data\.size=4 is less than StandIn's 8; set data\.size=8\.$"):
        alone.collate(ImageDataConfig(size=4))
    with torch.device("meta"):
        alone.model.perceptual = LPIPS(LPIPSConfig())
    with pytest.raises(ConfigError, match=r"LPIPS's 16; .*, or model/perceptual=stand_in, which takes 8\.$"):
        alone.collate(ImageDataConfig(size=12))


def test_it_says_once_what_its_perceptual_distance_is(root, tmp_path, capsys):
    module = stage()
    train(module, data_of(module, root), tmp_path, 2)
    assert capsys.readouterr().out.count(StandIn.label) == 1


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_weights_may_be_bf16_throughout(root, tmp_path, kind):
    module = stage(kind)
    metrics = train(module, data_of(module, root), tmp_path, 2, precision="bf16-true")
    assert {p.dtype for p in module.model.discriminator.parameters()} == {torch.bfloat16}
    assert metrics["val/psnr"] > 0


@pytest.mark.parametrize("weight", ["stage.adversarial_weight=0", "stage.adversarial_weight=null"])
def test_a_loss_without_a_discriminator_leaves_it_out(weight):
    cfg = compose("train", ["experiment=ldm/first_stage_kl_tiny", weight])
    assert (cfg.stage.trainable, cfg.stage.adversarial_weight) == (["first_stage"], 0)
    module = build_stage(cfg)
    assert set(parts_of(module.model)) == {"first_stage", "perceptual"}
    check_trainable(cfg)


def test_without_a_discriminator_the_autoencoder_learns_the_same(root, tmp_path):
    with_one = stage(adversarial_weight=0)
    train(with_one, data_of(with_one, root), tmp_path / "a", 2)
    built = model()
    built.discriminator = None
    settings = {**vars(with_one.config), "trainable": ["first_stage"]}
    without = make_stage(AutoencoderTrainingConfig(**settings), built, optim=with_one.optim)
    train(without, data_of(without, root), tmp_path / "b", 2)
    for name, value in without.model.first_stage.state_dict().items():
        assert torch.equal(value, with_one.model.first_stage.state_dict()[name]), name
    with pytest.raises(ConfigError, match=r"adversarial_weight=0\.5 needs a discriminator; set it to 0, or choose"):
        make_stage(AutoencoderTrainingConfig(**{**settings, "adversarial_weight": 0.5}), built)
