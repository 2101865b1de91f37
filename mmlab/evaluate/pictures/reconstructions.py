"""How well a first stage reconstructs images. Legend: B images, S side."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.evaluate.config import SampleQualityConfig
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet, distances
from mmlab.evaluate.pictures.fid_bias import caution
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.model.autoencoder import VQAutoencoder
from mmlab.model.fidelity import psnr, ssim
from mmlab.model.first_stage import FirstStage, to_signed, to_uint8
from mmlab.model.quantizer import usage
from mmlab.report.contact_sheet import contact_sheet

LINEAR_BYTES = 1 << 30
"""Memory for the float32 training images that a linear code is computed from."""
EQUAL = 99.0
"""Decibels of a perfect reconstruction, instead of infinity, which JSON does not have."""


@torch.no_grad()
def reconstruct(first_stage: FirstStage, pixels_B3SS: Tensor, counts: Counter[int] | None = None) -> Tensor:
    """uint8 images, encoded and decoded through the mean of the posterior; uint8 again.

    Args:
        first_stage: in eval mode.
        pixels_B3SS: the images.
        counts: receives the counts of the codes, if the first stage has a codebook.
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
    networks: Sequence[FeatureNetwork] = (),
    train: PictureSet | None = None,
    batch_size: int = SampleQualityConfig.batch_size,
) -> dict[str, Any]:
    """Mean PSNR (dB) and SSIM over the images, the model's perceptual distance, and rFID and rKID.

    With a codebook also `code_use`, the share of codes that occur, and their `perplexity`. Reconstructions are rounded
    to uint8 before anything is measured.

    Args:
        model: has a `first_stage`, and may have a `perceptual` distance with its `label`.
        pictures: held-out images.
        networks: compute the features of rFID and rKID; scores of the second and later ones are in the list `others`.
        train: training images, from which the best linear code with as many numbers as the latents is computed; its
            mean PSNR on `pictures` is reported for comparison (`linear_left_out` if memory is too small for that).
        batch_size: images at a time.

    Returns:
        Scores, as in `scores.json`.

    Raises:
        ConfigError: fewer training images than numbers in an image's latents.
        DataError: an image that cannot be read.
    """
    first_stage, perceptual = model.first_stage, getattr(model, "perceptual", None)
    values = first_stage.channels * first_stage.side(pictures.spec.size) ** 2
    if train is not None:
        # First, because the reconstructions take long.
        refuse_too_few(values, len(train))
    sums: dict[str, list[Tensor]] = {}
    sets = [(network, FeatureSet(), FeatureSet()) for network in networks]
    counts: Counter[int] = Counter()
    for batch in pictures.batches(batch_size, "reconstructing"):
        back = reconstruct(first_stage, batch, counts)
        x, y = to_signed(batch), to_signed(back)
        sums.setdefault("psnr", []).append(psnr(x, y).clamp(max=EQUAL))
        sums.setdefault("ssim", []).append(ssim(x, y))
        if perceptual is not None:
            device = first_stage.latent_mean.device
            sums.setdefault("perceptual", []).append(perceptual(x.to(device), y.to(device)).cpu())
        for network, real, made in sets:
            real.add(network(batch))
            made.add(network(back))
    scores: dict[str, Any] = {name: float(torch.cat(values).mean()) for name, values in sums.items()}
    if isinstance(first_stage, VQAutoencoder):
        book = torch.tensor([counts[code] for code in range(first_stage.quantizer.codes)])
        scores["code_use"], scores["perplexity"] = usage(book)
    if perceptual is not None:
        scores["perceptual_distance"] = perceptual.label
    several: list[dict[str, Any]] = []
    for network, real, made in sets:
        several.append({f"r{name}": value for name, value in distances(made, real).items()})
        several[-1] |= {"features": network.describe(), "caution": caution({}, made, real)}
    scores |= {**(several[0] if several else {}), **({"others": several[1:]} if several[1:] else {})}
    if train is not None:
        scores |= linear_scores(pictures, train, values, batch_size)
    return scores | {"pictures": pictures.describe()}


def linear_scores(pictures: PictureSet, train: PictureSet, values: int, batch_size: int) -> dict[str, Any]:
    """Mean PSNR (dB) of the best linear code with `values` numbers: `{linear_psnr, linear_values, linear_pictures}`.

    `{linear_left_out}` if more than `values` training images, which it needs, do not fit in memory.
    """
    size = pictures.spec.size
    fits = LINEAR_BYTES // (4 * 3 * size**2)
    if fits <= values:
        room = f"{LINEAR_BYTES / 2**30:.2g} GiB hold {fits} of {size} px"
        return {"linear_left_out": f"a linear code of {values} numbers needs more than {values} images, but {room}"}
    chosen = PictureSet(train.index.root, train.spec, min(len(train), fits))
    chosen.bad = train.bad
    code = LinearCode(torch.cat(list(chosen.batches(batch_size, "reading training images"))), values)
    decibels = [
        psnr(to_signed(batch), to_signed(code(batch))).clamp(max=EQUAL)
        for batch in pictures.batches(batch_size, "coding linearly")
    ]
    return {
        "linear_psnr": float(torch.cat(decibels).mean()),
        "linear_values": values,
        "linear_pictures": len(chosen),
    }


def reconstruction_sheet(first_stage: FirstStage, pictures: PictureSet, cells: int = 24) -> Image.Image:
    """Images spread over the set, each with its reconstruction on the right."""
    shown = PictureSet(pictures.index.root, pictures.spec, min(cells, len(pictures)), pictures.bad.budget)
    originals = torch.cat(list(shown.batches(cells, "reading images")))
    back = reconstruct(first_stage, originals)
    decibels = psnr(to_signed(originals), to_signed(back)).clamp(max=EQUAL).tolist()
    return contact_sheet(
        list(torch.cat([originals, back], -1)),
        [f"{value:.1f} dB" for value in decibels],
        columns=6,
        labels=[shown.key(n) for n in range(len(shown))],
        title=f"{pictures.index.root.name}: images and their reconstructions",
    )


def refuse_too_few(values: int, pictures: int) -> None:
    """Raise ConfigError if `pictures` images span fewer directions than a linear code of `values` numbers needs."""
    if not 0 < values < pictures:
        raise ConfigError(
            f"A linear code of {values} numbers needs more than {values} training images; there are {pictures}."
        )


class LinearCode:
    """Principal components of training images: the linear code of K numbers with the least squared error.

    Args:
        train_N3HW: uint8 `[N, 3, H, W]`.
        values: K, the numbers in a code.

    Raises:
        ConfigError: K is not below the number of training images.
    """

    def __init__(self, train_N3HW: Tensor, values: int):
        refuse_too_few(values, len(train_N3HW))
        flat = train_N3HW.flatten(1).float()
        self.mean = flat.mean(0)
        centered = flat - self.mean
        # The smaller of the two Gram matrices has the same components.
        if len(flat) <= flat.shape[1]:
            strength, vectors = torch.linalg.eigh(centered @ centered.T)
            axes = centered.T @ vectors[:, -values:] / strength[-values:].clamp(min=1e-6).sqrt()
        else:
            axes = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -values:]
        self.axes_DK, _ = torch.linalg.qr(axes)

    def __call__(self, pictures_N3HW: Tensor) -> Tensor:
        """The images, encoded and decoded: uint8 `[N, 3, H, W]`."""
        centered = pictures_N3HW.flatten(1).float() - self.mean
        decoded = centered @ self.axes_DK @ self.axes_DK.T + self.mean
        return decoded.round().clamp(0, 255).to(torch.uint8).view(pictures_N3HW.shape)
