"""Contest: VQGAN with its discriminator, from the start of the process to the saved first stage.

The other side is the step of Taming Transformers (arXiv 2012.09841), as its code orders it: one optimizer after the
other, each with a forward pass of its own through the autoencoder; the first with LPIPS of both images and the adaptive
weight at the last layer. Encoder, decoder and discriminator are the same networks with the same weights, at three
eighths of VQGAN-f16's widths; VGG16 has its own width, so LPIPS takes a larger share here. The discriminator's step
there sees the reconstructions of the autoencoder that has just been changed, so the losses differ a little more.

    python benchmarks/vqgan_training.py [ROUNDS]
"""

import time
from pathlib import Path
from typing import Any

import ldm_runs
import torch
from contest import Contest, Outcome, main, tiny
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = [16] * 5 if tiny() else [48, 48, 96, 96, 192]
CODES, WIDTH, PATCHES = 1024, 32 if tiny() else 96, 8 if tiny() else 24
SIZE, SAMPLES, STEPS, WARM = 32 if tiny() else 128, 2, 4 if tiny() else 12, 2
RATE, BETA, ADVERSARIAL, SHARE = 1e-5, 0.25, 0.8, 1.0


def prepare(folder: Path) -> None:
    """Write pictures, weights and the order of the samples."""
    import json

    import lightning
    from safetensors.torch import save_file

    from mmlab.config.compose import compose
    from mmlab.data.reader import GlobalBatches, LocalBatches
    from mmlab.model.config import LPIPSConfig
    from mmlab.model.perceptual import LPIPS
    from mmlab.stage.assembly import build_data, build_stage

    ldm_runs.write_pictures(folder, SAMPLES * STEPS)
    torch.manual_seed(0)
    perceptual = LPIPS(LPIPSConfig())
    for name, weight in perceptual.named_parameters():
        if name.startswith("lin"):
            weight.data.abs_()
    save_file(perceptual.state_dict(), folder / "lpips.safetensors")
    cfg = compose("train", overrides(folder))
    lightning.seed_everything(cfg.seed, verbose=False)
    stage = build_stage(cfg)
    torch.save(stage.model.state_dict(), folder / "weights.pt")
    data = build_data(cfg, stage)
    batches = LocalBatches(data.train_sources, stage.collate(data.config), GlobalBatches(SAMPLES, SAMPLES), data.config)
    keys = [key for step in range(STEPS) for key in batches[step]["keys"]]
    (folder / "order.json").write_text(json.dumps([f"{key}.jpg" for key in keys]))


def overrides(folder: Path) -> list[str]:
    """The command line of `mmlab train`."""
    return [
        "model=autoencoder",
        "model/first_stage=vqgan_f16",
        f"model.first_stage.architecture.block_out_channels={WIDTHS}",
        f"+model.first_stage.architecture.norm_num_groups={4 if tiny() else 16}",
        f"model.first_stage.quantizer={{codes: {CODES}, width: {WIDTH}, beta: {BETA}}}",
        "model/discriminator=patch",
        f"model.discriminator.width={PATCHES}",
        "model/perceptual=lpips",
        f"model.perceptual.source={folder}/lpips.safetensors",
        "stage=autoencoder",
        "stage.reduction=mean",
        f"stage.adversarial_weight={ADVERSARIAL}",
        "stage.adversarial_start=0",
        "callbacks=autoencoder",
        "callbacks.samples=null",
        *ldm_runs.common(folder, SIZE, SAMPLES, STEPS),
        f"optim.lr={RATE}",
        "optim.betas=[0.5, 0.9]",
        "run.name=contest",
    ]


def ours(folder: Path) -> Outcome:
    return ldm_runs.trained(folder, overrides(folder), SAMPLES, WARM)


class Perceptual(nn.Module):
    """LPIPS as the paper's code has it: each image passes through VGG16 by itself."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        from mmlab.model.config import LPIPSConfig
        from mmlab.model.perceptual import LPIPS

        network = LPIPS(LPIPSConfig())
        network.load_state_dict(weights, strict=False)
        self.network = network.requires_grad_(False).eval()

    def features(self, x: Tensor) -> list[Tensor]:
        x, features = (x - self.network.shift) / self.network.scale, []
        for stage in self.network._stages():
            x = stage(x)
            features.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return features

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(self.features(x), self.features(y), strict=True)
        heads = (getattr(self.network, f"lin{k}") for k in range(5))
        return sum((head((a - b) ** 2).mean((2, 3), keepdim=True) for head, (a, b) in zip(heads, pairs, strict=True)))  # type: ignore[return-value]


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder; the codebook's loss is of the paper's equation 4."""

    def __init__(self, parts: Any):
        super().__init__()
        self.encoder, self.quant_conv = parts.encoder, parts.quant_conv
        self.codebook = nn.Parameter(parts.quantizer.codebook.detach().clone())
        self.post_quant_conv, self.decoder = parts.post_quant_conv, parts.decoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1).contiguous()
        rows = z.view(-1, z.shape[-1])
        distances = rows.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * rows @ self.codebook.t()
        codes = self.codebook[distances.argmin(1)].view(z.shape)
        loss = (codes.detach() - z).square().mean() * BETA + (codes - z.detach()).square().mean()
        codes = (z + (codes - z).detach()).permute(0, 3, 1, 2).contiguous()
        return self.decoder(self.post_quant_conv(codes)), loss


class Loss(nn.Module):
    """The autoencoder's loss and the discriminator's, by the number of the optimizer."""

    def __init__(self, discriminator: nn.Module, perceptual: Perceptual):
        super().__init__()
        self.discriminator, self.perceptual = discriminator, perceptual

    def autoencoder(self, x: Tensor, made: Tensor, codebook: Tensor, last: nn.Parameter) -> tuple[Tensor, Tensor]:
        """(the loss, that without its adversarial term)."""
        distance = ((x - made).abs() + SHARE * self.perceptual(x, made)).mean()
        generator = -self.discriminator(made).mean()
        (first,) = torch.autograd.grad(distance, last, retain_graph=True)
        (second,) = torch.autograd.grad(generator, last, retain_graph=True)
        weight = (first.norm() / (second.norm() + 1e-4)).clamp(0, 1e4).detach() * ADVERSARIAL
        return distance + weight * generator + codebook, distance + codebook

    def discriminate(self, x: Tensor, made: Tensor) -> Tensor:
        real, fake = self.discriminator(x.detach()), self.discriminator(made.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def theirs(folder: Path) -> Outcome:
    from safetensors.torch import load_file

    from mmlab.config.compose import compose
    from mmlab.stage.assembly import build_stage

    model = build_stage(compose("train", overrides(folder))).model
    model.load_state_dict(torch.load(folder / "weights.pt"))
    autoencoder = Autoencoder(model.first_stage)
    loss = Loss(model.discriminator, Perceptual(load_file(folder / "lpips.safetensors"))).train()
    loss.perceptual.eval()
    of_autoencoder, of_discriminator = list(autoencoder.parameters()), list(model.discriminator.parameters())
    optimizers = [torch.optim.Adam(p, lr=RATE, betas=(0.5, 0.9)) for p in (of_autoencoder, of_discriminator)]
    last: Any = autoencoder.decoder.conv_out.weight
    data = ldm_runs.Pictures(folder, SIZE)
    ends, losses = [], []
    for batch in torch.utils.data.DataLoader(data, SAMPLES, num_workers=ldm_runs.WORKERS):
        x = batch["pixel_values"]
        for number, optimizer in enumerate(optimizers):
            # As Lightning does for several optimizers: the weights of the others need no gradients meanwhile.
            for parameters, learns in ((of_autoencoder, number == 0), (of_discriminator, number == 1)):
                for parameter in parameters:
                    parameter.requires_grad_(learns)
            made, codebook = autoencoder(x)
            if number == 0:
                total, logged = loss.autoencoder(x, made, codebook, last)
                losses.append(logged.item())
            else:
                total = loss.discriminate(x, made)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        ends.append(time.perf_counter())
    states = [stateful.state_dict() for stateful in (autoencoder, loss, *optimizers)]
    torch.save(states, folder / "peer.ckpt")
    return Outcome((STEPS - WARM) * SAMPLES, ends[-1] - ends[WARM - 1], losses)


# taming's discriminator sees reconstructions of the updated autoencoder: its later losses differ by up to 0.002.
CONTEST = Contest("VQGAN", "samples", {"taming's step": theirs, "mmlab train": ours}, prepare, tolerance=5e-3)

if __name__ == "__main__":
    main(CONTEST)
