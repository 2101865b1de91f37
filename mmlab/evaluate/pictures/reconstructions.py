"""What a first stage keeps of pictures that it has not seen. Legend: B pictures, S side."""

from collections import Counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet, caution, compare
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.fidelity import psnr, ssim
from mmlab.model.first_stage import FirstStage, to_signed, to_uint8
from mmlab.model.quantizer import usage
from mmlab.report.sheet import contact_sheet

LINEAR_BYTES = 1 << 30
"""Memory for the training pictures that a linear code is made from, as float32."""
EQUAL = 99.0
"""Decibels of a picture that comes back as it was, in place of infinity, which JSON does not have."""


@torch.no_grad()
def reconstruct(first_stage: FirstStage, pixels_B3SS: Tensor, counts: Counter[int] | None = None) -> Tensor:
    """Encode and decode uint8 pictures, through the mean of the posterior; uint8 again.

    Args:
        first_stage: in eval mode.
        pixels_B3SS: the pictures.
        counts: where codes are counted, of a first stage that has some.
    """
    device = first_stage.latent_mean.device
    latents = first_stage.encode(to_signed(pixels_B3SS).to(device)).mean
    if counts is not None and isinstance(first_stage, VQAutoencoder):
        counts.update(first_stage.quantizer.indices(latents).flatten().tolist())
    return to_uint8(first_stage.decode(latents)).cpu()


@torch.no_grad()
def score_reconstructions(
    model: Any,
    pictures: PictureSet,
    network: FeatureNetwork | None,
    train: PictureSet | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM over the pictures, the model's perceptual distance, and rFID and rKID.

    Of a first stage with a codebook also `code_use`, the share of its codes that occur, and their `perplexity`.

    Pictures come back as uint8, as from a file, before anything is measured.

    Args:
        model: has a `first_stage`, and may have a `perceptual` distance with its `label`.
        pictures: held out.
        network: of rFID and rKID; None leaves them out.
        train: training pictures; the best linear code of as many numbers as the latents have is made from them, and
            its mean PSNR on `pictures` stands beside the first stage's. Where memory has no room for enough of them,
            `linear_left_out` says so.
        batch_size: pictures at a time.

    Returns:
        Scores, as they stand in `scores.json`.

    Raises:
        ConfigError: fewer training pictures than numbers in a picture's latents.
        DataError: a picture that cannot be read.
    """
    first_stage, perceptual = model.first_stage, getattr(model, "perceptual", None)
    values = first_stage.channels * first_stage.side(pictures.spec.size) ** 2
    if train is not None:
        # Before the pictures are gone through, which takes long.
        refuse_too_few(values, len(train))
    sums: dict[str, list[Tensor]] = {}
    real, made = FeatureSet(), FeatureSet()
    counts: Counter[int] = Counter()
    for batch in pictures.batches(batch_size, "reconstructing"):
        back = reconstruct(first_stage, batch, counts)
        x, y = to_signed(batch), to_signed(back)
        sums.setdefault("psnr", []).append(psnr(x, y).clamp(max=EQUAL))
        sums.setdefault("ssim", []).append(ssim(x, y))
        if perceptual is not None:
            device = first_stage.latent_mean.device
            sums.setdefault("perceptual", []).append(perceptual(x.to(device), y.to(device)).cpu())
        if network is not None:
            real.add(network(batch))
            made.add(network(back))
    scores: dict[str, Any] = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    if isinstance(first_stage, VQAutoencoder):
        book = torch.tensor([counts[code] for code in range(first_stage.quantizer.codes)])
        scores["code_use"], scores["perplexity"] = usage(book)
    if perceptual is not None:
        scores["perceptual_distance"] = perceptual.label
    if network is not None:
        scores |= {f"r{name}": value for name, value in compare(made, real).items()}
        scores |= {"features": network.describe(), "caution": caution(made, real)}
    if train is not None:
        scores |= linear_scores(pictures, train, values, batch_size)
    return scores | {"pictures": pictures.describe()}


def linear_scores(pictures: PictureSet, train: PictureSet, values: int, batch_size: int) -> dict[str, Any]:
    """Mean PSNR (dB) of the best linear code with `values` numbers: `{linear_psnr, linear_values, linear_pictures}`.

    `{linear_left_out}` where more than `values` training pictures, which it takes, do not fit in memory.
    """
    size = pictures.spec.size
    fits = LINEAR_BYTES // (4 * 3 * size**2)
    if fits <= values:
        room = f"{LINEAR_BYTES / 2**30:.2g} GiB hold {fits} of {size} px"
        return {"linear_left_out": f"a linear code of {values} numbers takes more than {values} pictures, and {room}"}
    chosen = PictureSet(train.index.root, train.spec, min(len(train), fits))
    code = LinearCode(torch.cat(list(chosen.batches(batch_size, "reading training pictures"))), values)
    found = [
        psnr(to_signed(batch), to_signed(code(batch))).clamp(max=EQUAL)
        for batch in pictures.batches(batch_size, "coding linearly")
    ]
    return {
        "linear_psnr": float(torch.cat(found).mean()),
        "linear_values": values,
        "linear_pictures": len(chosen),
    }


def reconstruction_sheet(first_stage: FirstStage, pictures: PictureSet, cells: int = 24) -> Image.Image:
    """Some pictures, spread over the set, each with its reconstruction on the right."""
    shown = PictureSet(pictures.index.root, pictures.spec, min(cells, len(pictures)))
    originals = torch.stack([shown.picture(n) for n in range(len(shown))])
    back = reconstruct(first_stage, originals)
    decibels = psnr(to_signed(originals), to_signed(back)).clamp(max=EQUAL).tolist()
    return contact_sheet(
        list(torch.cat([originals, back], -1)),
        [f"{value:.1f} dB" for value in decibels],
        columns=6,
        labels=[shown.key(n) for n in range(len(shown))],
        title=f"{pictures.index.root.name}: pictures and what the first stage makes of them",
    )


def refuse_too_few(values: int, pictures: int) -> None:
    """Raise ConfigError where `pictures` span fewer directions than a linear code of `values` numbers needs."""
    if not 0 < values < pictures:
        raise ConfigError(
            f"A linear code of {values} numbers takes more than {values} training pictures; there are {pictures}."
        )


class LinearCode:
    """Principal components of training pictures: of all linear codes with K numbers, the one of least square error.

    Args:
        train_N3HW: uint8 `[N, 3, H, W]`.
        values: K, numbers that a picture is coded by; as many as a first stage's latents have.

    Raises:
        ConfigError: K is not below the number of training pictures, which span no more directions.
    """

    def __init__(self, train_N3HW: Tensor, values: int):
        refuse_too_few(values, len(train_N3HW))
        flat = train_N3HW.flatten(1).float()
        self.mean = flat.mean(0)
        centred = flat - self.mean
        # The smaller of the two Gram matrices has the same components.
        if len(flat) <= flat.shape[1]:
            strength, vectors = torch.linalg.eigh(centred @ centred.T)
            axes = centred.T @ vectors[:, -values:] / strength[-values:].clamp(min=1e-6).sqrt()
        else:
            axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -values:]
        self.axes_DK, _ = torch.linalg.qr(axes)

    def __call__(self, pictures_N3HW: Tensor) -> Tensor:
        """Coded and decoded again: uint8 `[N, 3, H, W]`."""
        centred = pictures_N3HW.flatten(1).float() - self.mean
        decoded = centred @ self.axes_DK @ self.axes_DK.T + self.mean
        return decoded.round().clamp(0, 255).to(torch.uint8).view(pictures_N3HW.shape)
