"""A classifier that is learned from images, and the scores of the samples that it accepts."""

import io
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmlab.config.errors import DataError
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.evaluate.pictures.drawn_samples import DrawnSamples
from mmlab.evaluate.pictures.fid import FeatureSet
from mmlab.evaluate.pictures.generators import CodeGenerator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.rejection import CAUTION, ClassProbe, Rejection, of_all_codes
from mmlab.evaluate.pictures.sample_scores import score_samples
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.conditioner import ClassCondition
from mmlab.model.config import ClassConditionConfig, CodeSamplerConfig
from mmlab.model.first_stage import to_uint8
from tests.evaluate.tiny_scores import SIDE, Quadrants
from tests.model.tiny_priors import prior_model
from tests.stage.tiny_diffusion import NAMES, diffusion_model

COLOURS = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
RIGHT = 3
"""One of so many samples shows its own class."""


def picture(label: int, seed: int) -> Tensor:
    """A class's color under noise, uint8 `[3, S, S]`."""
    noise = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return (COLOURS[label][:, None, None] + 40 * noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, PictureSet]:
    root = tmp_path_factory.mktemp("sets")
    for start, (name, count) in enumerate({"train": 60, "val": 45}.items()):
        with ShardWriter(root / name, 30, quiet=True) as writer:
            for i in range(count):
                file = io.BytesIO()
                Image.fromarray(picture(i % 3, 1000 * start + i).permute(1, 2, 0).numpy()).save(file, "PNG")
                record = {"class": NAMES[i % 3] if i else "unknown"}
                writer.write(f"{i:03d}", {"png": file.getvalue(), "json": record})
    return {name: PictureSet(root / name, ImageSpec(SIDE, "crop")) for name in ("train", "val")}


@dataclass
class Careless:
    """A generator that draws other classes more often than the right one."""

    model: Any = field(
        default_factory=lambda: diffusion_model(
            conditioner=ClassCondition(ClassConditionConfig(classes=NAMES, width=4))
        )
    )

    def __call__(self, given: dict[str, Tensor], seeds: list[int]) -> Tensor:
        pairs = zip(given["labels"].tolist(), seeds, strict=True)
        return torch.stack([picture((label + seed % RIGHT) % 3, seed) for label, seed in pairs])

    def noise(self, seeds: list[int]) -> Tensor:
        return torch.zeros(len(seeds), 3, SIDE, SIDE)

    def decode(self, z: Tensor) -> Tensor:
        return to_uint8(z)


def scored(sets, candidates: int, classifier: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    probe = ClassProbe(classifier or Quadrants(), sets["train"], NAMES, batch_size=16)
    return score_samples(
        Careless(), Quadrants(), sets["val"], None, 40, 16, seed=5, rejection=Rejection(probe, candidates)  # type: ignore[arg-type]
    )  # fmt: skip


def test_the_classifier_recognizes_unseen_images(sets):
    probe = ClassProbe(Quadrants(), sets["train"], NAMES, batch_size=16)
    assert probe.accuracy(sets["val"]) == 1, "the picture of an unknown class is passed over"
    likely = probe(torch.stack([picture(label, 77 + label) for label in range(3)]))
    assert likely.argmax(1).tolist() == [0, 1, 2]
    torch.testing.assert_close(likely.sum(1), torch.ones(3, dtype=torch.float64))
    others = ClassProbe(Quadrants(), sets["train"], NAMES[::-1])
    torch.testing.assert_close(others(torch.stack([picture(1, 9)])).flip(1), probe(torch.stack([picture(1, 9)])))
    with pytest.raises(DataError, match="has no image of the class 'moon'"):
        ClassProbe(Quadrants(), sets["train"], [*NAMES, "moon"])


def test_it_is_the_gaussian_posterior(sets):
    """With one feature and two classes it is a logistic function in closed form."""

    class Red(Quadrants):
        def __call__(self, pixels_N3HW: Tensor) -> Tensor:
            return super().__call__(pixels_N3HW)[:, :1]

    probe, red = ClassProbe(Red(), sets["train"], NAMES[:2]), Red()
    rows = {n: red(sets["train"].picture(n)[None])[0, 0].double() for n in range(1, 60) if n % 3 < 2}
    first, second = (torch.stack([x for n, x in rows.items() if n % 3 == label]) for label in (0, 1))
    within = torch.cat([first - first.mean(), second - second.mean()]).square().mean() * 1.1
    x = red(picture(0, 3)[None])[0, 0].double()
    apart = ((x - second.mean()).square() - (x - first.mean()).square()) / (2 * within)
    torch.testing.assert_close(probe(picture(0, 3)[None])[0, 0], apart.sigmoid(), rtol=1e-6, atol=1e-9)


def test_accepted_samples_are_those_that_show_their_class(sets):
    scores, sheets = scored(sets, candidates=2 * RIGHT)
    assert scores["confidence"] < 0.5 and scores["accepted_confidence"] > 0.99
    assert scores["rejection"]["acceptance"] == pytest.approx(1 / 6) and scores["rejection"]["accuracy"] == 1
    assert set(sheets) == {"samples", "accepted"} and "all_codes_fid" not in scores
    plain, _ = scored(sets, candidates=2)
    assert plain["fid"] == scores["fid"], "the samples of which none was rejected are the same"
    assert plain["confidence"] < plain["accepted_confidence"] < scores["accepted_confidence"]


def test_the_most_confident_samples_of_each_class_are_accepted(sets):
    probe, generator = ClassProbe(Quadrants(), sets["train"], NAMES), Careless()
    labels = [NAMES[n % 3] for n in range(10)]
    drawings = []

    def draw(_: Any, number: int) -> Any:
        pictures = generator({"labels": torch.arange(10) % 3}, list(range(10 * number, 10 * number + 10)))
        features = FeatureSet()
        features.add(Quadrants()(pictures))
        drawings.append(pictures)
        return DrawnSamples(pictures, labels, features)

    first = draw(None, 0)
    _, accepted = Rejection(probe, 4).rows(generator, draw, first, first.features)  # type: ignore[arg-type]
    assert len(drawings) == 4 and accepted.labels == labels
    torch.testing.assert_close(accepted.features.features, Quadrants()(accepted.pictures))
    for label in range(3):
        places = [n for n in range(10) if n % 3 == label]
        of_class = torch.cat([pictures[places] for pictures in drawings])
        best = probe(of_class)[:, label].topk(len(places)).values
        found = probe(accepted.pictures[places])[:, label]
        torch.testing.assert_close(found.sort(descending=True).values, best)


def test_a_classifier_with_the_network_of_the_distances_gets_a_caution(sets):
    class Other(Quadrants):
        def describe(self) -> dict[str, Any]:
            return {**super().describe(), "network": "another", "hash": "1"}

    assert scored(sets, 2)[0]["rejection"]["caution"] == CAUTION
    other = scored(sets, 2, Other())[0]["rejection"]
    assert other["caution"] is None and other["classifier"] == "linear discriminant on: another"


def test_top_k_and_nucleus_sampling_are_removed():
    def generator(**settings: Any) -> CodeGenerator:
        sampler = CodeSampler(CodeSamplerConfig(temperature=0.9, **settings))
        return CodeGenerator(prior_model("class"), sampler, (16, 16))

    whole = of_all_codes(generator(top_k=5, top_p=0.8, guidance=2))
    assert whole is not None and whole.sampler.config == CodeSamplerConfig(temperature=0.9, guidance=2)
    assert whole.shape == (16, 16)
    assert of_all_codes(generator()) is None and of_all_codes(Careless()) is None  # type: ignore[arg-type]
