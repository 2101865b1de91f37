"""`mmlab score fid`: distances between two folders of images."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from mmlab.data.bad_samples import sample_errors
from mmlab.data.formats import IMAGE_EXTENSIONS
from mmlab.data.images import open_image
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, feature_networks, features_of
from mmlab.evaluate.pictures.fid import FeatureSet, compare, distances
from mmlab.evaluate.pictures.fid_bias import caution, extrapolated
from mmlab.evaluate.pictures.picture_files import PictureFiles, open_pictures
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.scores.score_table import write_scores
from mmlab.report.contact_sheet import contact_sheet
from mmlab.runs.disk import no_file, replacing
from mmlab.verbs._repetition import settings_of

SHOWN = 24
"""Images of each set on the sheet."""


def score_folders(cfg: DictConfig) -> None:
    """Compare two sets of images; `out` also writes the scores and a sheet of both."""
    out = None if cfg.out is None else no_file(Path(cfg.out))
    opened = [open_pictures(path) for path in (cfg.pictures, cfg.references)]
    networks = feature_networks(cfg.features, cfg.root)
    if cfg.trainer.accelerator != "cpu" and torch.cuda.is_available():
        networks = [network.to(torch.device("cuda")) for network in networks]
    size = cfg.size or _side(PictureSet(opened[0], ImageSpec(1), budget=cfg.bad_budget))
    spec = ImageSpec(size, cfg.aspect)
    made, real = (PictureSet(one, spec, cfg.limit, cfg.bad_budget) for one in opened)
    several = [_scores(made, real, network, cfg.batch_size) for network in networks]
    scores = several[0]
    sets = {"pictures": made, "references": real}
    for name, one in sets.items():
        print(f"{name:<28}{len(one):>12,}")
    for each in several:
        for name, value in each.items():
            if isinstance(value, float):
                print(f"{name.replace('_', ' '):<28}{value:>12,.4g}")
        print(f"features: {each['features']['network']}, at {size} px")
        print(*filter(None, [each["caution"]]), sep="\n", end="\n" * bool(each["caution"]))
    for one in sets.values():
        if isinstance(one.index, PictureFiles) and one.index.left_out:
            print(f"{one.index.root}: not read: {one.index.left_out}")
        if one.bad:
            print(f"{one.index.root}: {one.bad}")
    if out is not None:
        described = {name: one.describe() for name, one in sets.items()}
        bad = {f"bad_{name}": one.bad.as_json() for name, one in sets.items()}
        others = {"others": several[1:]} if several[1:] else {}
        write_scores(out, {"metric": "fid", **scores, **others, **described, "settings": settings_of(cfg), **bad})
        with replacing(out / "pictures.png") as draft:
            _sheet(made, real, scores).save(draft)
        print(f"scores: {out / 'scores.json'}; pictures: {out / 'pictures.png'}")


def _scores(made: PictureSet, real: PictureSet, network: FeatureNetwork, batch_size: int) -> dict[str, Any]:
    """All scores of two sets of images in the features of a network."""
    ours, theirs = (features_of(one, network, batch_size) for one in (made, real))
    scores: dict[str, Any] = compare(ours, theirs) | extrapolated(ours, theirs) | _halves(theirs.features)
    return scores | {"features": network.describe(), "caution": caution(scores, ours, theirs)}


def _side(pictures: PictureSet) -> int:
    """The shorter side of the first image that can be read."""
    for place in pictures.places:
        try:
            with sample_errors():
                members = pictures.index.read(place, IMAGE_EXTENSIONS)
                return min(open_image(next(iter(members.values()))).size)
        except SampleError:
            continue
    pictures.bad.refuse_all("images")


def _halves(features_NF: Tensor) -> dict[str, float]:
    """The distances between two halves of the real images: what samples as good as these would have."""
    if len(features_NF) < 4:
        return {}
    halves = [FeatureSet(), FeatureSet()]
    for n, half in enumerate(halves):
        half.add(features_NF[n::2])
    return {f"halves_{name}": value for name, value in distances(*halves).items() if name != "kid_std"}


def _sheet(made: PictureSet, real: PictureSet, scores: dict[str, Any]) -> Image.Image:
    """Images spread over both sets."""
    shown, labels = [], []
    for one, name in ((made, "picture"), (real, "reference")):
        chosen = [n * len(one) // SHOWN for n in range(SHOWN)] if len(one) > SHOWN else range(len(one))
        shown += [one.picture(n) for n in chosen]
        labels += [f"{name} {one.key(n)}" for n in chosen]
    title = f"FID {scores['fid']:.4g}, KID {scores['kid']:.4g}; references come after the pictures"
    return contact_sheet(shown, [""] * len(shown), 8, labels=labels, title=title, cell=128)
