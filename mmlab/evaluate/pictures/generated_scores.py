"""How near a generative model's pictures are to real ones, and whether they are copies of what it was trained on."""

from typing import Any

import torch
from PIL import Image

from mmlab.evaluate.pictures.drawn_samples import Drawn, draw_samples, features_of, noise_features
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork
from mmlab.evaluate.pictures.fid import FeatureSet, caution, compare, nearest
from mmlab.evaluate.pictures.generators import BorrowedConditions, PictureGenerator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.rejection import Rejection
from mmlab.report.sheet import BAD, contact_sheet

CLOSE = 0.05
"""A sample is called close to a training picture where fewer than this share of real unseen pictures are closer."""


def score_samples(
    generator: PictureGenerator,
    network: FeatureNetwork,
    pictures: PictureSet,
    train: PictureSet | None = None,
    count: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
    rejection: Rejection | None = None,
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Draw samples under the conditions of real pictures, and compare them with these and with training pictures.

    Args:
        generator: the model that draws.
        network: whose features are compared.
        pictures: real pictures, held out or not; Fréchet and kernel distance are taken to them.
        train: training pictures; their own distance to `pictures` is what a perfect memory scores, and the samples'
            nearest neighbours among them tell whether they are copies.
        count, batch_size, seed: samples, how many at a time, and the seed of the first (one more for each).
        rejection: scores samples that a classifier accepts, too, each way of sampling in numbers of its own.

    Returns:
        Scores: `fid`, `kid`, `kid_std`, `noise_…` of noise decoded in the same way, `train_…` and `neighbours` where
        `train` is given, `Rejection.rows` and `rejection` where that is given, `samples`, `features`, `pictures`,
        `caution`; and sheets by name: `samples`, `neighbours`, `accepted`.

    Raises:
        DataError: pictures without a condition that the model knows, or that cannot be read.
    """
    conditions = BorrowedConditions(generator.model, pictures, count)
    drawn = draw_samples(generator, conditions, network, count, batch_size, seed)
    real = features_of(pictures, network, batch_size)
    scores: dict[str, Any] = dict(compare(drawn.features, real))
    noise = noise_features(generator, network, count, batch_size, seed)
    scores |= {f"noise_{name}": value for name, value in compare(noise, real).items()}
    sheets = {"samples": sample_sheet(drawn)}
    if rejection is not None:

        def draw(of: PictureGenerator, number: int) -> Drawn:
            return draw_samples(of, conditions, network, count, batch_size, seed + number * count)

        rows, accepted = rejection.rows(generator, draw, drawn, real)
        scores |= rows | {"rejection": rejection.describe(network, pictures)}
        sheets["accepted"] = sample_sheet(accepted)
    if train is not None:
        known = features_of(train, network, batch_size)
        # Pictures that were trained on are no measure of how near unseen ones are.
        unseen = None if train.index.hash == pictures.index.hash else real
        if unseen is not None:
            scores |= {f"train_{name}": value for name, value in compare(known, real).items()}
        scores["neighbours"] = neighbours(drawn.features, known, unseen)
        sheets["neighbours"] = neighbour_sheet(drawn, train, known, unseen)
    about = {"features": network.describe(), "pictures": pictures.describe()}
    return scores | {"samples": count, **about, "caution": caution(drawn.features, real)}, sheets


def neighbours(samples: FeatureSet, train: FeatureSet, unseen: FeatureSet | None) -> dict[str, float]:
    """Distances in feature space to the nearest training picture.

    Returns:
        `samples_median`; with unseen real pictures also `unseen_median` and `close`, the share of samples that are
        nearer to a training picture than 95 % of the unseen pictures are: about 0.05 for samples that are as new as
        these, 1 for copies.
    """
    ours, _ = nearest(samples.features, train.features)
    found = {"samples_median": float(ours.median())}
    if unseen is not None:
        theirs, _ = nearest(unseen.features, train.features)
        close = (ours < theirs.quantile(CLOSE)).float().mean()
        found |= {"unseen_median": float(theirs.median()), "close": float(close)}
    return found


def sample_sheet(drawn: Drawn, cells: int = 48) -> Image.Image:
    """The first samples, with what each was to show."""
    shown = list(drawn.pictures[:cells])
    return contact_sheet(shown, drawn.told[:cells], columns=8, cell=128, title=f"{len(shown)} samples", max_lines=3)


def neighbour_sheet(
    drawn: Drawn, train: PictureSet, features: FeatureSet, unseen: FeatureSet | None, cells: int = 24
) -> Image.Image:
    """Samples, the nearest to a training picture first, each with that picture on its right; close ones are red.

    Args:
        drawn: the samples.
        train: training pictures.
        features: of the training pictures, in their order.
        unseen: features of real pictures that were not trained on.
        cells: how many of the nearest samples are shown.
    """
    distances, places = nearest(drawn.features.features, features.features)
    limit = nearest(unseen.features, features.features)[0].quantile(CLOSE) if unseen is not None else None
    order = distances.argsort()[:cells].tolist()
    pairs = [torch.cat([drawn.pictures[n], train.picture(int(places[n]))], -1) for n in order]
    return contact_sheet(
        pairs,
        [f"{drawn.told[n]}\ndistance {distances[n]:.3g}".strip() for n in order],
        columns=6,
        colours=[BAD if limit is not None and distances[n] < limit else None for n in order],
        labels=[train.key(int(places[n])) for n in order],
        title="samples and their nearest training pictures, nearest first",
        max_lines=4,
    )
