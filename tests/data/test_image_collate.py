"""Images and cached latents become the same batches, for any number of ranks and micro-batches."""

import io
import pickle
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mmlab.class_names import class_index
from mmlab.config.errors import ConfigError, DataError
from mmlab.data import image_condition
from mmlab.data.cache_collate import LatentCollate
from mmlab.data.config import ImageDataConfig
from mmlab.data.conversation import pad_id
from mmlab.data.formats import ENCODED_AS, FIRST_STAGE
from mmlab.data.image_collate import ImageCollate, mirrored, stack
from mmlab.data.image_condition import Conditioning
from mmlab.data.mixture import Source
from mmlab.data.reader import GlobalBatches, LocalBatches
from mmlab.data.sample_types import ImageSpec, Sample, SampleError
from mmlab.data.shard_files import ShardWriter
from tests.tiny_pictures import square
from tests.tiny_shards import settings
from tests.tiny_tokenizers import llama_2, wordpiece

NAMES = ["circle", "square", "7"]
RAMP = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
FORM = ImageSpec(6, "crop").form
# Seeds of samples that are mirrored, and that are not.
TURNED, STRAIGHT = (next(seed for seed in range(99) if mirrored(seed) is flip) for flip in (True, False))


def images_of(*conditioning: Any, **options: Any) -> ImageCollate:
    return ImageCollate(ImageDataConfig(**{"size": 4, **options}), Conditioning(*conditioning))


def latents_of(first_stage: str = "abc", flip: bool = False, labels: Any = None) -> LatentCollate:
    return LatentCollate(ImageDataConfig(size=6, flip=flip), first_stage, (2, 3, 3), Conditioning(labels))


def sample(record: dict[str, Any], seed: int = STRAIGHT, **members: bytes) -> Sample:
    return Sample("k", "s", record, [square(RAMP.clone())], seed, members)


def latent(
    tensors: dict[str, torch.Tensor] | None = None,
    seed: int = STRAIGHT,
    made_by: str = "abc",
    encoded_as: str | None = FORM,
) -> Sample:
    record = {FIRST_STAGE: made_by, ENCODED_AS: encoded_as}
    return Sample("k", "s", record, [], seed, {"safetensors": save(tensors or posterior())})


def posterior(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    names = ("mean", "logvar", "mean_flipped", "logvar_flipped")
    return {name: torch.full((2, 3, 3), i + 0.5, dtype=dtype) for i, name in enumerate(names)}


def one(collate: Any, only: Sample) -> dict[str, Any]:
    return collate.batch([collate.prepare(only).content])


def test_a_class_is_looked_up_once(monkeypatch):
    read, calls = Conditioning(NAMES[:2]), []
    monkeypatch.setattr(image_condition, "class_index", lambda *call: calls.append(call) or class_index(*call))
    labels = [int(read(sample({}, cls=data))[0]["labels"]) for data in (b"1\n", b"square", b"1") * 2]
    assert labels == [1] * 6 and len(calls) == 2


def test_half_of_the_images_are_mirrored_by_their_seeds():
    assert sum(map(mirrored, range(2000))) == pytest.approx(1000, abs=80)
    plain, flipping = images_of(), images_of(flip=True)
    for seed in (TURNED, STRAIGHT):
        assert torch.equal(one(plain, sample({}, seed))["pixel_values"][0], RAMP)
    assert torch.equal(one(flipping, sample({}, STRAIGHT))["pixel_values"][0], RAMP)
    turned = one(flipping, sample({}, TURNED))
    assert torch.equal(turned["pixel_values"][0], RAMP.flip(2))
    assert turned["seeds"].tolist() == [TURNED] and turned["seeds"].dtype == torch.int64


@pytest.mark.parametrize(
    ("record", "members", "names", "label"),
    [
        ({"class": "square"}, {}, NAMES, 1),
        ({"class": 7}, {}, NAMES, 2),
        ({}, {"cls": b"circle"}, NAMES, 0),
        ({"class": "circle"}, {"cls": b"square"}, NAMES, 0),
        ({"class": 0}, {}, ["circle", "square"], 0),  # words: the place in the list
        ({}, {"cls": b"1\n"}, ["circle", "square"], 1),
        ({"class": 3}, {}, [3, 5, 7], 0),
    ],
)
def test_a_class_comes_from_the_record_or_the_cls_member(record, members, names, label):
    batch = one(images_of(names), sample(record, **members))
    assert batch["labels"].tolist() == [label] and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("record", "names", "says"),
    [
        ({}, NAMES, "no class"),
        ({"class": "squar"}, NAMES, "Did you mean 'square'"),
        ({"class": 3}, ["circle", "square"], "There is no class"),
        ({"class": -1}, ["circle", "square"], "There is no class"),
        ({"class": True}, ["circle", "square"], "There is no class"),
        ({"class": "1_0"}, list("abcdefghijkl"), "There is no class"),
        ({"class": 1}, [3, 5, 7], "There is no class .1"),  # not the second of them, 5
        ({"class": 0}, NAMES, "There is no class .0"),  # one name is a number
    ],
)
def test_a_class_that_is_missing_or_unknown(record, names, says):
    with pytest.raises(SampleError, match=says) as caught:
        images_of(names).prepare(sample(record))
    assert caught.value.reason == "no-class"


def test_an_image_without_conditions_needs_no_class_and_no_caption():
    assert set(one(images_of(), sample({}))) == {"pixel_values", "seeds"}
    assert images_of().prepare(sample({})).counters == {"pictures": 1}
    with pytest.raises(SampleError, match="no image"):
        images_of().prepare(Sample("k", "s", {}, [], 0))
    with pytest.raises(SampleError, match=r"data\.latents=true"):
        images_of().prepare(latent())


def test_captions_have_one_length_and_cuts_are_counted():
    tokenizer = deepcopy(wordpiece())  # to cut a text leaves a mark on a tokenizer, and others use this one
    collate = images_of(None, tokenizer, 6)
    texts = sample({"caption": "a red square"}), sample({"caption": "red blue " * 9})
    short, long = (one(collate, text) for text in texts)
    whole = tokenizer("a red square")["input_ids"]
    assert short["input_ids"][0, : len(whole)].tolist() == whole
    assert short["attention_mask"][0].tolist() == [1] * len(whole) + [0] * (6 - len(whole))
    assert set(short["input_ids"][0, len(whole) :].tolist()) <= {pad_id(tokenizer)}
    assert long["input_ids"].shape == short["input_ids"].shape == (1, 6)
    assert [collate.prepare(text).counters["truncated"] for text in texts] == [0, 1]
    expected = tokenizer(["red blue " * 9], truncation=True, max_length=6)["input_ids"]
    assert long["input_ids"].tolist() == expected
    with pytest.raises(SampleError, match="no caption"):
        collate.prepare(sample({}))


def test_a_caption_is_drawn_by_the_seed():
    collate = images_of(None, llama_2(), 12)
    record = {"captions": ["red", "blue"]}
    drawn = {tuple(one(collate, sample(record, seed))["input_ids"][0].tolist()) for seed in range(20)}
    assert len(drawn) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_are_mirrored_as_the_images_are(dtype):
    tensors = posterior(dtype)
    for flip, seed, ending in ((False, TURNED, ""), (True, STRAIGHT, ""), (True, TURNED, "_flipped")):
        batch = one(latents_of(flip=flip), latent(tensors, seed))
        assert batch["mean"].dtype == torch.float32
        for name in ("mean", "logvar"):
            assert torch.equal(batch[name][0], tensors[name + ending].float())
    mean_alone = {name: tensors[name] for name in ("mean", "mean_flipped")}
    assert "logvar" not in one(latents_of(), latent(mean_alone)), "a deterministic first stage"


@pytest.mark.parametrize(
    ("one_sample", "flip", "says"),
    [
        (latent(made_by="stale"), False, "made by the first stage stale, but this model's is abc"),
        (sample({}), False, "holds no latents"),
        (latent({"mean": torch.zeros(2, 3, 3)}), True, "encode with --flip"),
        (latent({"mean": torch.full((2, 3, 3), torch.inf)}), False, "'mean' of source 's' has NaN or infinity"),
        (latent({"mean": torch.zeros(2, 6, 6)}), False, r"shape \[2, 6, 6\], but the first stage makes \[2, 3, 3\]"),
        (latent({"codes": torch.zeros(3, 3)}), False, "holds codes, not latents; encode the images with --as latents"),
        (
            latent(encoded_as=ImageSpec(6, "pad").form),
            False,
            r"with data.size=6 data.aspect=pad, .* data.aspect=crop: set",
        ),
        (
            latent(encoded_as=ImageSpec(8, "crop").form),
            False,
            r"with data.size=8 .* this run has data.size=6",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(one_sample, flip, says):
    with pytest.raises(SampleError, match=says):
        latents_of(flip=flip).prepare(one_sample)


def test_damaged_latents_are_a_bad_sample():
    broken = Sample("k", "s", {FIRST_STAGE: "abc", ENCODED_AS: FORM}, [], 0, {"safetensors": b"no"})
    for one_sample in (broken, latent({"logvar": torch.zeros(2, 3, 3)})):
        with pytest.raises(SampleError) as caught:
            latents_of().prepare(one_sample)
        assert caught.value.reason == "latents"


def test_an_unknown_aspect_is_a_config_error():
    with pytest.raises(ConfigError, match="Did you mean 'stretch'"):
        images_of(aspect="stretched")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures with classes in the record or as a member, and latents with the same keys."""
    root = tmp_path_factory.mktemp("sources")
    with ShardWriter(root / "s", 4, quiet=True) as pictures:
        for i in range(10):
            png = io.BytesIO()
            Image.new("RGB", (8, 6), (20 * i, 0, 0)).save(png, "PNG")
            label: Any = {"json": {"class": NAMES[i % 3]}} if i % 2 else {"cls": NAMES[i % 3]}
            pictures.write(f"k{i}", {"png": png.getvalue(), **label})
    with ShardWriter(root / "latents" / "s", 4, quiet=True) as latents:
        for i in range(10):
            member = {name: value * i for name, value in posterior().items()}
            record = {FIRST_STAGE: "abc", ENCODED_AS: FORM, "class": NAMES[i % 3]}
            latents.write(f"k{i}", {"safetensors": save(member), "json": record})
    return [Source("s", pictures.index)], [Source("s", latents.index)]


def joined(sources: list[Source], collate: Any, micro: int, world: int) -> list[dict[str, Any]]:
    """Three global batches of 8, put together from the micro-batches of all ranks."""
    cuts = [GlobalBatches(8, micro, world, rank) for rank in range(world)]
    ranks = [LocalBatches(sources, collate, cut, settings(seed=3)) for cut in cuts]
    parts = 8 // (micro * world)
    batches = []
    for step in range(3):
        pieces = [rank[step * parts + part] for part in range(parts) for rank in ranks]
        batches.append(
            {
                name: list(chain(*(piece[name].tolist() for piece in pieces)))
                for name, value in pieces[0].items()
                if isinstance(value, torch.Tensor)
            }
        )
    return batches


@pytest.mark.parametrize("kind", [0, 1])
def test_batches_are_the_same_for_any_ranks_and_micro_batches(sources, kind):
    collates = (
        images_of(NAMES, flip=True),
        latents_of(flip=True, labels=NAMES),
    )
    expected = joined(sources[kind], collates[kind], 8, 1)
    copied = pickle.loads(pickle.dumps(collates[kind]))
    for micro, world in ((4, 1), (2, 2), (1, 8)):
        assert joined(sources[kind], copied, micro, world) == expected
    assert len(set(chain(*(batch["seeds"] for batch in expected)))) == 24


def test_latents_have_the_seeds_and_classes_of_the_images(sources):
    pictures = joined(sources[0], images_of(NAMES), 8, 1)
    latents = joined(sources[1], latents_of(labels=NAMES), 8, 1)
    for name in ("seeds", "labels"):
        assert [batch[name] for batch in pictures] == [batch[name] for batch in latents]
    with pytest.raises(DataError, match=r"the first stage abc, but this model's is stale"):
        joined(sources[1], latents_of("stale"), 8, 1)


def test_a_batch_of_latents_of_which_some_lack_the_variance_is_refused():
    both, one = ({name: torch.zeros(1) for name in names} for names in (("mean", "logvar"), ("mean",)))
    for contents in ([both, one], [one, both]):
        with pytest.raises(DataError, match="some samples of a batch have logvar and others do not"):
            stack(contents)
