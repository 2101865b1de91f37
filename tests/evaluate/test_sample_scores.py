"""Scores of samples: copies are found, and each sample depends only on its seed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmlab.config.errors import DataError
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import ShardWriter
from mmlab.diffusion.config import DiffusionConfig, GuidanceConfig, SamplerConfig
from mmlab.diffusion.process import Diffusion
from mmlab.diffusion.samplers import Sampler
from mmlab.evaluate.pictures.drawn_samples import PictureConditions
from mmlab.evaluate.pictures.generators import PictureGenerator, picture_generator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.sample_scores import score_samples
from mmlab.model.conditioner import ClassCondition, NoCondition, TextCondition
from mmlab.model.config import ClassConditionConfig, TextConditionConfig
from mmlab.model.first_stage import to_uint8
from tests.evaluate.tiny_scores import SIDE, Quadrants, make_noise
from tests.model.tiny_priors import prior_model
from tests.stage.tiny_diffusion import NAMES, diffusion_model
from tests.tiny_files import png

SPEC = ImageSpec(SIDE, "crop")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for seed, (name, count) in enumerate({"train": 200, "val": 60, "more": 60}.items()):
        make_noise(folder / name, count, seed)
    return folder


def generator(model=None, scale: float = 1.0) -> PictureGenerator:
    sampler = Sampler(SamplerConfig(name="ddpm", steps=3, guidance=GuidanceConfig(scale)))
    process = Diffusion(DiffusionConfig(schedule="cosine", target="v"))
    return picture_generator((model or diffusion_model()).eval(), sampler, process, size=SIDE)


class Repeats:
    """A generator whose samples are the images of a set."""

    def __init__(self, pictures: PictureSet):
        self.model = diffusion_model(conditioner=NoCondition())
        self.pictures = pictures

    def __call__(self, given: Any, seeds: list[int]) -> torch.Tensor:
        return torch.stack([self.pictures.picture(seed % len(self.pictures)) for seed in seeds])

    def noise(self, seeds: list[int]) -> torch.Tensor:
        return torch.ones(len(seeds), 3, SIDE, SIDE)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return to_uint8(z)


def scores_of(repeats: str, root: Path, against: str = "val", train: str | None = "train", count: int = 60):
    sets = {name: PictureSet(root / name, SPEC) for name in ("train", "val", "more")}
    fake: Any = Repeats(sets[repeats])
    return score_samples(fake, Quadrants(), sets[against], sets[train] if train else None, count, batch_size=25)


def test_copies_of_training_pictures_are_found(root):
    scores, sheets = scores_of("train", root)
    assert scores["neighbours"]["samples_median"] == 0 and scores["neighbours"]["close"] == 1
    assert scores["neighbours"]["unseen_median"] > 0
    assert sheets["neighbours"].width > 1500 and isinstance(sheets["samples"], Image.Image)


def test_new_pictures_are_as_far_as_unseen_ones(root):
    neighbours = scores_of("more", root)[0]["neighbours"]
    assert neighbours["close"] < 0.2
    assert neighbours["samples_median"] == pytest.approx(neighbours["unseen_median"], rel=0.2)


def test_real_pictures_are_near_and_noise_is_far(root):
    scores, _ = scores_of("more", root)
    assert scores["samples"] == 60 and scores["pictures"]["pictures"] == 60
    assert abs(scores["kid"]) < 0.05 * scores["noise_kid"]
    assert scores["fid"] < 0.3 * scores["noise_fid"] and scores["train_fid"] < scores["noise_fid"]
    assert scores["caution"] is None, "60 pictures for 12 features"
    assert "59 images" in scores_of("more", root, count=59)[0]["caution"]
    itself, _ = scores_of("val", root)
    assert itself["fid"] == pytest.approx(0, abs=1e-4)


def test_without_training_pictures_or_with_the_same(root):
    scores, sheets = scores_of("more", root, train=None)
    assert "neighbours" not in scores and set(sheets) == {"samples"}
    same, sheets = scores_of("train", root, against="train", count=200)
    assert "train_fid" not in same and set(same["neighbours"]) == {"samples_median"} and "neighbours" in sheets


def test_a_sample_depends_on_its_seed_and_condition_alone():
    draw = generator()
    labels = torch.tensor([0, 2, 1])
    together = draw({"labels": labels}, [5, 6, 7])
    assert together.shape == (3, 3, SIDE, SIDE) and together.dtype == torch.uint8
    assert torch.equal(draw({"labels": labels[1:2]}, [6])[0], together[1])
    assert not torch.equal(draw({"labels": labels[1:2]}, [8])[0], together[1])
    assert not torch.equal(draw({"labels": labels[:1]}, [6])[0], together[1])


def test_guidance_is_the_samplers():
    model = diffusion_model()
    with torch.no_grad():
        model.conditioner.embedding.weight.mul_(50)  # type: ignore[union-attr]
    given = {"labels": torch.tensor([0, 1])}
    plain, guided, null = (generator(model, scale)(given, [1, 2]) for scale in (1.0, 4.0, 0.0))
    assert not torch.equal(plain, guided)
    assert torch.equal(null, generator(model)({"labels": torch.tensor([3, 3])}, [1, 2]))


def test_conditions_are_taken_from_images_in_turn(root, tokenizer_folder):
    pictures = PictureSet(root / "val", SPEC, 6)
    classes = ClassCondition(ClassConditionConfig(classes=NAMES, width=4))
    inputs, names = PictureConditions(diffusion_model(conditioner=classes), pictures, 8)(4, 8)
    records = [pictures.sample(n % 6).record for n in range(4, 8)]
    assert names == [record["class"] for record in records]
    assert inputs["labels"].tolist() == [NAMES.index(name) for name in names]
    assert PictureConditions(diffusion_model(conditioner=NoCondition()), pictures, 2)(0, 2) == ({}, ["", ""])
    bert = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    settings = {"architecture": {**bert, "num_attention_heads": 1}, "tokenizer": str(tokenizer_folder)}
    text = TextCondition(TextConditionConfig(init="random", max_length=16, **settings))
    inputs, names = PictureConditions(diffusion_model(conditioner=text), pictures, 2)(0, 2)
    assert names == [pictures.sample(n).record["caption"] for n in (0, 3)], "spread: sets are often sorted by class"
    assert torch.equal(inputs["input_ids"], text.tokenize(names)["input_ids"])


def test_a_map_that_cannot_be_decoded_is_left_out(tmp_path):
    with ShardWriter(tmp_path / "maps", quiet=True) as writer:
        writer.write("broken", {"png": png(SIDE, SIDE), "map.png": b"no picture"})
    with pytest.raises(DataError, match=r"maps has no maps that can be used: 1 sample .* 'broken'"):
        PictureConditions(prior_model("map"), PictureSet(tmp_path / "maps", SPEC), 1)
    with ShardWriter(tmp_path / "more", quiet=True) as writer:
        writer.write("broken", {"png": png(SIDE, SIDE), "map.png": b"no picture"})
        writer.write("whole", {"png": png(SIDE, SIDE), "map.png": png(SIDE, SIDE)})
    pictures = PictureSet(tmp_path / "more", SPEC)
    assert len(PictureConditions(prior_model("map"), pictures, 2)(0, 2)[0]["map_pixels"]) == 2
    assert pictures.bad.reasons == {"decode": 1}


def test_conditions_that_the_model_does_not_know(root):
    def conditions(name: str) -> PictureConditions:
        conditioner = ClassCondition(ClassConditionConfig(classes=[name], width=4))
        return PictureConditions(diffusion_model(conditioner=conditioner), PictureSet(root / "val", SPEC, 6), 6)

    assert set(conditions("star")(0, 6)[1]) == {"star"}
    with pytest.raises(DataError, match=r"has no condition for the model; its last sample: There is no class"):
        conditions("squarre")
