"""Pictures and cached latents become the same batches, whatever ranks and micro-batches make them."""

import io
import pickle
from copy import deepcopy
from itertools import chain
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.conversation import pad_id
from mmlab.data.image_collate import ENCODED_AS, FIRST_STAGE, ImageCollate, LatentCollate, form, mirrored
from mmlab.data.image_condition import Conditioning
from mmlab.data.reader import GlobalBatches, LocalBatches, Source
from mmlab.data.sample import Sample, SampleError
from mmlab.data.shards import ShardWriter
from tests.tiny_tokenizers import llama_2, wordpiece

NAMES = ["circle", "square", "7"]
RAMP = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
FORM = form(6, "crop")
# One that is mirrored, and one that is not.
TURNED, STRAIGHT = (next(seed for seed in range(99) if mirrored(seed) is wanted) for wanted in (True, False))


def sample(record: dict[str, Any], seed: int = STRAIGHT, **members: bytes) -> Sample:
    return Sample("k", "s", record, RAMP.clone(), seed, members)


def latent(
    tensors: dict[str, torch.Tensor] | None = None,
    seed: int = STRAIGHT,
    made_by: str = "abc",
    encoded_as: str | None = FORM,
) -> Sample:
    record = {FIRST_STAGE: made_by, ENCODED_AS: encoded_as}
    return Sample("k", "s", record, None, seed, {"safetensors": save(tensors or posterior())})


def posterior(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    names = ("mean", "logvar", "mean_flipped", "logvar_flipped")
    return {name: torch.full((2, 3, 3), i + 0.5, dtype=dtype) for i, name in enumerate(names)}


def one(collate: Any, given: Sample) -> dict[str, Any]:
    return collate.batch([collate.prepare(given)])


def test_half_of_the_pictures_are_mirrored_by_their_seeds():
    assert sum(map(mirrored, range(2000))) == pytest.approx(1000, abs=80)
    plain, flipping = ImageCollate(4), ImageCollate(4, flip=True)
    for seed in (TURNED, STRAIGHT):
        assert torch.equal(one(plain, sample({}, seed))["pixel_values"][0], RAMP)
    assert torch.equal(one(flipping, sample({}, STRAIGHT))["pixel_values"][0], RAMP)
    turned = one(flipping, sample({}, TURNED))
    assert torch.equal(turned["pixel_values"][0], RAMP.flip(2))
    assert turned["seeds"].tolist() == [TURNED] and turned["seeds"].dtype == torch.int64


@pytest.mark.parametrize(
    ("record", "members", "label"),
    [
        ({"class": "square"}, {}, 1),
        ({"class": 0}, {}, 0),
        ({"class": 7}, {}, 2),  # the name comes before the number
        ({}, {"cls": b"1\n"}, 1),
        ({}, {"cls": b"circle"}, 0),
        ({"class": "circle"}, {"cls": b"1"}, 0),
    ],
)
def test_a_class_comes_from_the_record_or_the_cls_member(record, members, label):
    batch = one(ImageCollate(4, conditioning=Conditioning(NAMES)), sample(record, **members))
    assert batch["labels"].tolist() == [label] and batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "no class"),
        ({"class": "squar"}, "Did you mean 'square'"),
        ({"class": 3}, "none of the 3"),
        ({"class": -1}, "none of the 3"),
    ],
)
def test_a_class_that_is_missing_or_unknown(record, says):
    with pytest.raises(SampleError, match=says) as caught:
        ImageCollate(4, conditioning=Conditioning(NAMES)).prepare(sample(record))
    assert caught.value.reason == "no-class"


def test_a_picture_without_conditions_needs_no_class_and_no_caption():
    batch = one(ImageCollate(4), sample({}))
    assert set(batch) == {"pixel_values", "seeds", "keys", "stats", "bad"}
    assert batch["stats"] == {"s": {"pictures": 1}} and batch["keys"] == ["k"]
    with pytest.raises(SampleError, match="no picture"):
        ImageCollate(4).prepare(Sample("k", "s", {}, None, 0))
    with pytest.raises(DataError, match=r"data\.latents=true"):
        ImageCollate(4).prepare(latent())


def test_captions_have_one_length_and_cuts_are_counted():
    tokenizer = deepcopy(wordpiece())  # to cut a text leaves a mark on a tokenizer, and others use this one
    collate = ImageCollate(4, conditioning=Conditioning(None, tokenizer, 6))
    short, long = (one(collate, sample({"caption": text})) for text in ("a red square", "red blue " * 9))
    whole = tokenizer("a red square")["input_ids"]
    assert short["input_ids"][0, : len(whole)].tolist() == whole
    assert short["attention_mask"][0].tolist() == [1] * len(whole) + [0] * (6 - len(whole))
    assert set(short["input_ids"][0, len(whole) :].tolist()) <= {pad_id(tokenizer)}
    assert long["input_ids"].shape == short["input_ids"].shape == (1, 6)
    assert (short["stats"]["s"]["truncated"], long["stats"]["s"]["truncated"]) == (0, 1)
    expected = tokenizer(["red blue " * 9], truncation=True, max_length=6)["input_ids"]
    assert long["input_ids"].tolist() == expected
    with pytest.raises(SampleError, match="no caption"):
        collate.prepare(sample({}))


def test_a_caption_is_drawn_by_the_seed():
    collate = ImageCollate(4, conditioning=Conditioning(None, llama_2(), 12))
    record = {"captions": ["red", "blue"]}
    drawn = {tuple(one(collate, sample(record, seed))["input_ids"][0].tolist()) for seed in range(20)}
    assert len(drawn) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_are_mirrored_as_the_pictures_are(dtype):
    tensors = posterior(dtype)
    for flip, seed, ending in ((False, TURNED, ""), (True, STRAIGHT, ""), (True, TURNED, "_flipped")):
        batch = one(LatentCollate("abc", (2, 3, 3), FORM, flip), latent(tensors, seed))
        assert batch["mean"].dtype == torch.float32
        for name in ("mean", "logvar"):
            assert torch.equal(batch[name][0], tensors[name + ending].float())
    mean_alone = {name: tensors[name] for name in ("mean", "mean_flipped")}
    assert "logvar" not in one(LatentCollate("abc", (2, 3, 3), FORM), latent(mean_alone)), "a deterministic first stage"


@pytest.mark.parametrize(
    ("given", "flip", "says"),
    [
        (latent(made_by="stale"), False, "made by the first stage stale, and this model's is abc"),
        (sample({}), False, "holds no latents"),
        (latent({"mean": torch.zeros(2, 3, 3)}), True, "encode with --flip"),
        (latent({"mean": torch.zeros(2, 6, 6)}), False, r"shape \[2, 6, 6\], and the first stage makes \[2, 3, 3\]"),
        (
            latent(encoded_as=form(6, "pad")),
            False,
            r"with data.size=6 data.aspect=pad, .* data.aspect=crop: set",
        ),
        (
            latent(encoded_as=form(8, "crop")),
            False,
            r"with data.size=8 .* this run has data.size=6",
        ),
        (latent(encoded_as=None), False, r"encoded with an unknown data.aspect, and .*: encode them again"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(given, flip, says):
    with pytest.raises(DataError, match=says):
        LatentCollate("abc", (2, 3, 3), FORM, flip).prepare(given)


def test_damaged_latents_are_a_bad_sample():
    broken = Sample("k", "s", {FIRST_STAGE: "abc", ENCODED_AS: FORM}, None, 0, {"safetensors": b"no"})
    for given in (broken, latent({"logvar": torch.zeros(2, 3, 3)})):
        with pytest.raises(SampleError) as caught:
            LatentCollate("abc", (2, 3, 3), FORM).prepare(given)
        assert caught.value.reason == "latents"


def test_an_unknown_aspect_is_a_config_error():
    with pytest.raises(ConfigError, match="Did you mean 'stretch'"):
        ImageCollate(4, aspect="stretched")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures with classes in the record or as a member, and latents with the same keys."""
    root = tmp_path_factory.mktemp("sources")
    with ShardWriter(root / "s", 4, quiet=True) as pictures:
        for i in range(10):
            png = io.BytesIO()
            Image.new("RGB", (8, 6), (20 * i, 0, 0)).save(png, "PNG")
            told: Any = {"json": {"class": NAMES[i % 3]}} if i % 2 else {"cls": str(i % 3)}
            pictures.write(f"k{i}", {"png": png.getvalue(), **told})
    with ShardWriter(root / "latents" / "s", 4, quiet=True) as latents:
        for i in range(10):
            member = {name: value * i for name, value in posterior().items()}
            record = {FIRST_STAGE: "abc", ENCODED_AS: FORM, "class": NAMES[i % 3]}
            latents.write(f"k{i}", {"safetensors": save(member), "json": record})
    return [Source("s", pictures.index)], [Source("s", latents.index)]


def joined(sources: list[Source], collate: Any, micro: int, world: int) -> list[dict[str, Any]]:
    """Three global batches of 8, put together from the micro-batches of all ranks."""
    ranks = [LocalBatches(sources, collate, GlobalBatches(8, micro, world, rank), seed=3) for rank in range(world)]
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
def test_ranks_and_micro_batches_get_what_one_rank_gets(sources, kind):
    collates = (
        ImageCollate(4, flip=True, conditioning=Conditioning(NAMES)),
        LatentCollate("abc", (2, 3, 3), FORM, True, Conditioning(NAMES)),
    )
    expected = joined(sources[kind], collates[kind], 8, 1)
    copied = pickle.loads(pickle.dumps(collates[kind]))
    for micro, world in ((4, 1), (2, 2), (1, 8)):
        assert joined(sources[kind], copied, micro, world) == expected
    assert len(set(chain(*(batch["seeds"] for batch in expected)))) == 24


def test_latents_have_the_seeds_and_classes_of_the_pictures(sources):
    pictures = joined(sources[0], ImageCollate(4, conditioning=Conditioning(NAMES)), 8, 1)
    latents = joined(sources[1], LatentCollate("abc", (2, 3, 3), FORM, conditioning=Conditioning(NAMES)), 8, 1)
    for name in ("seeds", "labels"):
        assert [batch[name] for batch in pictures] == [batch[name] for batch in latents]
    with pytest.raises(DataError, match=r"the first stage abc, and this model's is stale"):
        joined(sources[1], LatentCollate("stale", (2, 3, 3), FORM), 8, 1)
