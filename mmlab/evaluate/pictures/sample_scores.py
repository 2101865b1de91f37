"""Distances of a generative model's samples from real images (FID, KID), and from its training images."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mmlab.evaluate.config import SampleQualityConfig
from mmlab.evaluate.pictures.drawn_samples import DrawnSamples, PictureConditions, draw_samples, noise_features
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, features_of
from mmlab.evaluate.pictures.fid import FeatureSet, compare, nearest
from mmlab.evaluate.pictures.fid_bias import caution, extrapolated
from mmlab.evaluate.pictures.generators import PictureGenerator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.rejection import Rejection
from mmlab.report.contact_sheet import BAD, contact_sheet

CLOSE = 0.05
"""A sample is close to a training image if fewer than this share of unseen real images are closer to theirs."""


def score_samples(
    generator: PictureGenerator,
    network: FeatureNetwork,
    pictures: PictureSet,
    train: PictureSet | None = None,
    count: int = 1000,
    batch_size: int = SampleQualityConfig.batch_size,
    seed: int = 0,
    rejection: Rejection | None = None,
    others: Sequence[FeatureNetwork] = (),
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """Draw samples under the conditions of real images, and compare them with these and with training images.

    Args:
        generator: draws the samples.
        network: computes the features that are compared.
        pictures: real images, held out or not, to which the distances are measured.
        train: training images; their own distance to `pictures` is the score of perfect memorization, and the samples'
            nearest neighbors among them show whether samples are copies.
        count, batch_size, seed: number of samples, how many at a time, and the seed of the first (then one more each).
        rejection: also scores the samples that a classifier accepts.
        others: networks in whose features the samples are compared, too.

    Returns:
        Scores: those of `compare` and `extrapolated`; `noise_…` of decoded noise; `train_…` and `neighbours` with
        `train`; `Rejection.rows` and `rejection` with `rejection`; `others`, a list of the scores in the features of
        each; `samples`, `features`, `pictures`, `train`, `caution`; `truncated_captions` if the text encoder does not
        read some captions to their end. And sheets by name: `samples`, `neighbours`, `accepted`.

    Raises:
        DataError: images that have no condition for the model, or cannot be read.
    """
    conditions = PictureConditions(generator.model, pictures, count)
    samples = draw_samples(generator, conditions, network, count, batch_size, seed)
    real = features_of(pictures, network, batch_size)
    scores: dict[str, Any] = compare(samples.features, real) | extrapolated(samples.features, real)
    noise = noise_features(generator, network, count, batch_size, seed)
    scores |= {f"noise_{name}": value for name, value in compare(noise, real).items()}
    sheets = {"samples": sample_sheet(samples)}
    if rejection is not None:

        def draw(of: PictureGenerator, number: int) -> DrawnSamples:
            return draw_samples(of, conditions, network, count, batch_size, seed + number * count)

        rows, accepted = rejection.rows(generator, draw, samples, real)
        scores |= rows | {"rejection": rejection.describe(network, pictures)}
        sheets["accepted"] = sample_sheet(accepted)
    if train is not None:
        trained = features_of(train, network, batch_size)
        # Training images do not show how close unseen ones are.
        unseen = None if train.index.hash == pictures.index.hash else real
        if unseen is not None:
            scores |= {f"train_{name}": value for name, value in compare(trained, real).items()}
        scores["neighbours"] = neighbours(samples.features, trained, unseen)
        sheets["neighbours"] = neighbour_sheet(samples, train, trained, unseen)
    if others:
        scores["others"] = [_scores_of(samples, pictures, train, other, batch_size) for other in others]
    about: dict[str, Any] = {"features": network.describe(), "pictures": pictures.describe()}
    if train is not None:
        about["train"] = train.describe()
    if conditions.truncated:
        about["truncated_captions"] = conditions.truncated
    return scores | {"samples": count, **about, "caution": caution(scores, samples.features, real)}, sheets


def _scores_of(
    samples: DrawnSamples, pictures: PictureSet, train: PictureSet | None, network: FeatureNetwork, batch_size: int
) -> dict[str, Any]:
    """The scores of samples in the features of another network; `train_…` of unseen training images."""
    drawn, real = FeatureSet(), features_of(pictures, network, batch_size)
    for batch in samples.pictures.split(batch_size):
        drawn.add(network(batch))
    scores: dict[str, Any] = compare(drawn, real) | extrapolated(drawn, real)
    if train is not None and train.index.hash != pictures.index.hash:
        trained = compare(features_of(train, network, batch_size), real)
        scores |= {f"train_{name}": value for name, value in trained.items()}
    return scores | {"features": network.describe(), "caution": caution(scores, drawn, real)}


def neighbours(samples: FeatureSet, train: FeatureSet, unseen: FeatureSet | None) -> dict[str, float]:
    """Distances in feature space to the nearest training image.

    Returns:
        `samples_median`; with unseen real images also `unseen_median` and `close`, the share of samples that are closer
        to a training image than 95 % of the unseen images are: about 0.05 for samples as new as these, 1 for copies.
    """
    ours, _ = nearest(samples.features, train.features)
    medians = {"samples_median": float(ours.median())}
    if unseen is not None:
        theirs, _ = nearest(unseen.features, train.features)
        close = (ours < theirs.quantile(CLOSE)).float().mean()
        medians |= {"unseen_median": float(theirs.median()), "close": float(close)}
    return medians


def sample_sheet(samples: DrawnSamples, cells: int = 48) -> Image.Image:
    """The first samples with their labels."""
    shown = list(samples.pictures[:cells])
    return contact_sheet(shown, samples.labels[:cells], columns=8, cell=128, title=f"{len(shown)} samples", max_lines=3)


def neighbour_sheet(
    samples: DrawnSamples, train: PictureSet, features: FeatureSet, unseen: FeatureSet | None, cells: int = 24
) -> Image.Image:
    """The samples closest to a training image, each with that image on its right; close ones (see `CLOSE`) are red.

    Args:
        samples: the samples.
        train: training images.
        features: features of the training images, in their order.
        unseen: features of real images that were not trained on.
        cells: number of samples shown.
    """
    distances, places = nearest(samples.features.features, features.features)
    limit = nearest(unseen.features, features.features)[0].quantile(CLOSE) if unseen is not None else None
    order = distances.argsort()[:cells].tolist()
    pairs = [torch.cat([samples.pictures[n], train.picture(int(places[n]))], -1) for n in order]
    return contact_sheet(
        pairs,
        [f"{samples.labels[n]}\ndistance {distances[n]:.3g}".strip() for n in order],
        columns=6,
        colors=[BAD if limit is not None and distances[n] < limit else None for n in order],
        labels=[train.key(int(places[n])) for n in order],
        title="samples and their nearest training images, nearest first",
        max_lines=4,
    )
