"""Each dialogue has the same tokens in a batch as alone, packed or not."""

import pickle
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE
from mmlab.data.collate import ChatCollate, PairCollate
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.conversation import Segment, encode
from mmlab.data.dialogues import conversations_of
from mmlab.data.image_condition import Conditioning
from mmlab.data.sample_types import ImageSpec, Sample, SampleError
from tests.tiny_pictures import square
from tests.tiny_tokenizers import TOKENIZERS, llama_2, llama_3, wordpiece

SPEC = ImageSpec(size=4, tokens=5)
PAD = 0
PROMPT = Prompt("v1", system="Look.")


def sample(key: str, record: dict, image: bool = True, source: str = "shapes") -> Sample:
    pixels = torch.full((3, 4, 4), sum(map(ord, key)) % 256, dtype=torch.uint8)
    pictures = [square(pixels, SPEC.tokens)] if image else []
    return Sample(key, source, record, pictures, seed=sum(map(ord, key)), shards=f"hash of {source}")


def questions(n: int, words: int = 1) -> dict:
    return {"questions": [{"question": f"Is it {i}?", "answer": "no " * words + str(i)} for i in range(n)]}


def talk(*texts: str) -> dict:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]}


SAMPLES = [
    sample("a", questions(4)),
    sample("b", talk("<image>\nWhat?", "A red square.", "Sure?", "Yes.")),
    sample("c", talk("Hello", "Good day."), image=False, source="chat"),
    sample("d", questions(1)),
    sample("e", {"caption": "Two circles"}),
    sample("f", talk("<image>\nWhat?", "A red square. " * 3)),
]


def chat(prompt: Prompt = PROMPT, spec: ImageSpec | None = SPEC, tokenizer: Any = None, **options) -> ChatCollate:
    return ChatCollate(ImageTextDataConfig(**options), prompt, tokenizer or llama_2(), spec)


def pairs(tokenizer: Any, spec: ImageSpec = SPEC, **options) -> PairCollate:
    return PairCollate(ImageTextDataConfig(**options), tokenizer, spec)


def batch_of(samples: list[Sample], collate: ChatCollate | PairCollate) -> dict:
    """A batch, with the counters of each source as the reader adds them up."""
    prepared = [collate.prepare(one) for one in samples]
    stats: dict[str, Counter] = defaultdict(Counter)
    for one, made in zip(samples, prepared, strict=True):
        stats[one.source].update(made.counters)
    return {**collate.batch([made.content for made in prepared]), "stats": stats}


def starts(batch: dict, tokens: int = SPEC.tokens) -> list[list[int]]:
    """Row and first column of each picture, the places of which follow each other."""
    positions = batch["image_positions"].reshape(-1, tokens, 2)
    assert (positions - positions[:, :1] == torch.arange(tokens)[:, None] * torch.tensor([0, 1])).all()
    return positions[:, 0].tolist()


def segments_of(collate: ChatCollate, one: Sample) -> list[Segment]:
    return [segment for group in collate.prepare(one).content for segment in group.segments]


def seen_by(batch: dict, row: int) -> torch.Tensor:
    """[T, T]: what each token sees, by the rule that the batch promises."""
    segment, context = batch["segment_ids"][row], batch["context_ids"][row]
    same = segment[:, None] == segment[None, :]
    shared = context[:, None] == segment[None, :]
    return (same | shared).tril() & (segment > 0)[:, None] & (segment > 0)[None, :]


def dialogues_in(batch: dict) -> list[tuple[tuple[int, int, int], ...]]:
    """Each dialogue as (position, token, label), rebuilt from what the last token of a segment sees."""
    dialogues = []
    for row in range(len(batch["input_ids"])):
        sees, segments = seen_by(batch, row), batch["segment_ids"][row]
        contexts = set(batch["context_ids"][row].tolist()) - {0}
        for segment in sorted(set(segments.tolist()) - {0} - contexts):
            last = int((segments == segment).nonzero()[-1])
            visible = sees[last].nonzero()[:, 0]
            columns = [batch[name][row][visible].tolist() for name in ("position_ids", "input_ids", "labels")]
            dialogues.append(tuple(zip(*columns, strict=True)))
    return dialogues


def expected(one: Sample) -> list[tuple[tuple[int, int, int], ...]]:
    dialogues = conversations_of(one.record, PROMPT, one.seed, len(one.pictures))
    encoded = [encode(dialogue, PROMPT, llama_2(), [SPEC.tokens]) for dialogue in dialogues]
    return [tuple(zip(range(len(e.labels)), e.input_ids, e.labels, strict=True)) for e in encoded]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("max_length", [85, 120, 400])
def test_every_dialogue_has_the_tokens_that_it_has_alone(pack: bool, max_length: int) -> None:
    batch = batch_of(SAMPLES, chat(max_length=max_length, pack=pack))
    assert Counter(dialogues_in(batch)) == Counter(d for one in SAMPLES for d in expected(one))
    rows, length = batch["input_ids"].shape
    assert length % 8 == 0 and length - 8 < int((batch["segment_ids"] > 0).sum(1).max()) <= max_length
    assert pack == (rows < len(SAMPLES))
    padding = batch["segment_ids"] == 0
    assert (batch["input_ids"][padding] == PAD).all() and (batch["labels"][padding] == IGNORE).all()
    assert (batch["position_ids"][padding] == 0).all() and (batch["context_ids"][padding] == 0).all()
    for name in ("input_ids", "position_ids", "segment_ids", "context_ids", "labels", "image_positions"):
        assert batch[name].dtype == torch.int64


@pytest.mark.parametrize("pack", [False, True])
def test_images_have_the_positions_that_the_batch_states(pack: bool) -> None:
    batch = batch_of(SAMPLES, chat(max_length=90, pack=pack))
    assert batch["pixel_values"].dtype == torch.uint8
    assert len(batch["pixel_values"]) == len(batch["image_keys"]) == len(starts(batch))
    assert batch["image_features"].tolist() == list(range(len(batch["pixel_values"]) * SPEC.tokens))
    assert sorted(set(batch["image_keys"])) == [f"hash of shapes/{key}" for key in "abdef"]
    images = {f"hash of {one.source}/{one.key}": one.image for one in SAMPLES if one.image is not None}
    marked = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for picture, (row, at), key in zip(batch["pixel_values"], starts(batch), batch["image_keys"], strict=True):
        assert torch.equal(picture, images[key])
        places = slice(at, at + SPEC.tokens)
        assert len(set(batch["segment_ids"][row, places].tolist())) == 1
        assert (batch["input_ids"][row, places] == PAD).all() and (batch["labels"][row, places] == IGNORE).all()
        marked[row, places] = True
    assert ((batch["input_ids"] == PAD) == (marked | (batch["segment_ids"] == 0))).all()


def test_questions_share_one_image() -> None:
    batch = batch_of([SAMPLES[0]], chat(max_length=400))
    assert batch["input_ids"].shape[0] == 1 and len(batch["pixel_values"]) == 1
    segments, contexts = batch["segment_ids"][0], batch["context_ids"][0]
    assert segments.max() == 5
    assert (contexts[segments == 1] == 0).all() and (contexts[segments > 1] == 1).all()
    prefix = int((segments == 1).sum())
    assert starts(batch) == [[0, prefix - SPEC.tokens]]
    for question in range(2, 6):
        assert batch["position_ids"][0][segments == question][0] == prefix
    sees = seen_by(batch, 0)
    assert not sees[segments == 3][:, segments == 2].any() and sees[segments == 3][:, segments == 1].all()


def test_questions_of_packed_samples_share_their_own_image() -> None:
    longer, shorter = sample("b", questions(3)), sample("a", questions(2))
    batch = batch_of([shorter, longer], chat(max_length=400, pack=True))
    segments, contexts = batch["segment_ids"].tolist(), batch["context_ids"].tolist()
    assert len(segments) == 1 and longer.image is not None and shorter.image is not None
    assert torch.equal(batch["pixel_values"], torch.stack([longer.image, shorter.image]))
    pairs = set(zip(segments[0], contexts[0], strict=True)) - {(0, 0)}
    assert pairs == {(1, 0), (2, 1), (3, 1), (4, 1), (5, 0), (6, 5), (7, 5)}
    assert [segments[0][at] for _, at in starts(batch)] == [1, 5]


def test_a_sample_that_overflows_repeats_its_image() -> None:
    batch = batch_of([SAMPLES[0]], chat(max_length=60))
    rows = batch["input_ids"].shape[0]
    assert rows > 1 and batch["image_keys"] == ["hash of shapes/a"] * rows
    assert [row for row, _ in starts(batch)] == list(range(rows))
    assert Counter(dialogues_in(batch)) == Counter(expected(SAMPLES[0]))


def test_text_questions_are_ordinary_segments() -> None:
    batch = batch_of([sample("t", questions(3), image=False)], chat())
    assert batch["segment_ids"].max() == 3 and batch["context_ids"].max() == 0
    assert batch["pixel_values"].shape == (0, 3, 4, 4) and batch["pixel_values"].dtype == torch.uint8
    assert batch["image_positions"].shape == (0, 2)
    assert batch["stats"]["shapes"]["text_only"] == 1


def test_nothing_is_predicted_across_segments() -> None:
    # The model shifts labels along the row: the first token of a segment would be learned from a stranger.
    batch = batch_of(SAMPLES, chat(Prompt("v1", supervise="all"), pack=True))
    starts = batch["segment_ids"].diff(dim=1, prepend=torch.zeros(len(batch["labels"]), 1, dtype=torch.int64)) != 0
    assert starts.any() and (batch["labels"][starts] == IGNORE).all()
    learned = sum(counters["tokens_with_loss"] for counters in batch["stats"].values())
    assert learned == int((batch["labels"] != IGNORE).sum())


def test_the_same_samples_make_the_same_batch() -> None:
    for pack in (False, True):
        first, second = (batch_of(SAMPLES, chat(max_length=90, pack=pack)) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first if isinstance(first[k], torch.Tensor))
        assert first["image_keys"] == second["image_keys"]


def test_counters_agree_with_the_rows() -> None:
    long = sample("g", talk("<image>\nWhat?", "A red square.", "And?", "no " * 100, "More?", "no"))
    partly = sample("h", {"questions": [*questions(2)["questions"], {"question": "Q", "answer": "no " * 200}]})
    batch = batch_of([*SAMPLES, long, partly], chat(max_length=90, pack=True))
    shapes, text = batch["stats"]["shapes"], batch["stats"]["chat"]
    assert text["text_only"] == 1 and text["pictures"] == 0 and shapes["text_only"] == 0
    assert shapes["truncated"] == 2 and shapes["turns_dropped"] == 2 + 1
    assert shapes["pictures"] == len(batch["image_keys"])
    assert shapes["tokens"] + text["tokens"] == int((batch["segment_ids"] > 0).sum())
    assert shapes["tokens_with_loss"] + text["tokens_with_loss"] == int((batch["labels"] != IGNORE).sum())


def reason(one: Sample, **options) -> str:
    with pytest.raises(SampleError) as error:
        chat(**options).prepare(one)
    return error.value.reason


def test_unusable_samples_are_errors() -> None:
    assert reason(sample("a", talk("Q", "no " * 100)), max_length=40) == "too-long"
    few = ChatCollate(ImageTextDataConfig(), PROMPT, llama_2(), SPEC, vocabulary=len(llama_2()) - 1)
    few.prepare(sample("a", talk("Q", "A")))
    last = llama_2().convert_ids_to_tokens(len(llama_2()) - 1)
    with pytest.raises(SampleError, match=r"and '.+' is not one of them") as caught:
        few.prepare(sample("a", talk("Q", f"A {last}")))
    assert caught.value.reason == "vocabulary"
    assert reason(sample("a", questions(2, words=100)), max_length=40) == "too-long"
    assert reason(sample("a", {})) == "no-caption"
    assert reason(sample("a", talk("<image>\nQ", "a"), image=False)) == "no-picture"
    assert reason(sample("a", questions(1), image=False), prompt=Prompt(pictures="text")) == "no-caption"


def test_images_as_text_are_not_decoded() -> None:
    for pictures in ("text", "scattered", "none"):
        collate = chat(Prompt(pictures=pictures))
        assert collate.image is None
        batch = batch_of([sample("a", {"caption": "Red."} | questions(2), image=False)], collate)
        assert len(batch["pixel_values"]) == len(batch["image_positions"]) == 0
        assert batch["segment_ids"].max() == (3 if pictures == "scattered" else 2)
    assert chat(Prompt()).image == SPEC


def test_scattered_captions_have_the_places_of_images() -> None:
    record = {"caption": "Two circles"} | questions(3)
    scattered, shown = Prompt("v1", pictures="scattered", places=40), ImageSpec(4, tokens=40)
    collate = chat(scattered, None)
    batch = batch_of([sample("a", record, image=False)], collate)
    picture = square(torch.zeros(3, 4, 4, dtype=torch.uint8), 40)
    like = batch_of([replace(sample("a", record), pictures=[picture])], chat(Prompt("v1"), shown))
    for name in ("segment_ids", "context_ids", "position_ids", "labels"):
        assert torch.equal(batch[name], like[name]), name
    (row, at), caption = starts(like, 40)[0], llama_2().encode("Two circles", add_special_tokens=False)
    places = torch.zeros_like(batch["segment_ids"], dtype=torch.bool)
    places[row, at : at + 40] = True
    assert torch.equal(batch["input_ids"][~places], like["input_ids"][~places])
    counts = Counter(batch["input_ids"][places].tolist())
    assert all(counts[token] > 40 * 0.1 / 2 / len(caption) for token in caption)
    again = batch_of([sample("a", record, image=False)], collate)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    other = segments_of(collate, replace(sample("a", record, image=False), seed=8))[0]
    assert other.input_ids != batch["input_ids"][row, : at + 40].tolist()
    shares = []
    for seed in range(200):
        context = segments_of(collate, replace(sample("a", record, image=False), seed=seed))[0]
        shares.append(sum(token in caption for token in context.input_ids[at:]) / 40)
    assert min(shares) < 0.2 and max(shares) > 0.95 and abs(sum(shares) / 200 - 0.55) < 0.1


def test_scattered_captions_are_needed_only_where_an_image_is_meant() -> None:
    prompt = Prompt(pictures="scattered")
    assert reason(sample("a", questions(1), image=False), prompt=prompt) == "no-caption"
    collate = chat(prompt, None)
    assert collate.prepare(sample("c", talk("Hello", "Good day."), image=False)).counters["text_only"] == 1
    plain = chat(Prompt("plain", pictures="scattered", places=3), None)
    assert len(segments_of(plain, sample("e", {"caption": "Two"}, image=False))[0]) > 3
    with pytest.raises(ConfigError, match="max_length=64"):
        chat(prompt, None, max_length=64)


def test_captions_in_conversations_are_scattered() -> None:
    collate = chat(Prompt("plain", pictures="scattered", places=40, captions="blip"), None)
    answer, caption = talk("<image>", "Two circles!"), {"caption": "Two circles!"}
    assert segments_of(collate, sample("a", answer)) == segments_of(collate, sample("a", caption))
    assert reason(sample("a", talk("<image>", " ! ")), prompt=collate.prompt) == "no-caption"


def test_a_caption_without_a_token_cannot_be_scattered() -> None:
    for prompt in (Prompt("plain", pictures="scattered"), Prompt("v1", pictures="scattered")):
        with pytest.raises(SampleError) as error:
            chat(prompt, None, wordpiece()).prepare(sample("a", {"caption": "\x01"} | questions(1)))
        assert error.value.reason == "no-caption"


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"takes 5 tokens and a row data\.max_length=5; set data\.max_length above"):
        chat(max_length=5)
    with pytest.raises(ConfigError, match="takes 0 tokens; the vision encoder or Q-Former must give it some"):
        chat(spec=ImageSpec(4))
    tiles = ImageSpec(4, "anyres", 4, ((1, 1), (1, 2)))
    with pytest.raises(ConfigError, match=r"up to 14 tokens .* above it, or fewer tiles in data\.grids"):
        chat(spec=tiles, max_length=14)
    assert chat(spec=tiles, max_length=15).image == tiles
    with pytest.raises(ConfigError, match=r"A scattered caption takes 9 .* or prompt\.places below it"):
        chat(Prompt("v1", pictures="scattered", places=9), max_length=9)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_collates_can_be_pickled(name: str) -> None:
    one = sample("e", {"caption": "Two circles"})
    for collate in (chat(tokenizer=TOKENIZERS[name](), pack=True), pairs(TOKENIZERS[name]())):
        here, there = batch_of([one], collate), batch_of([one], pickle.loads(pickle.dumps(collate)))
        assert torch.equal(here["input_ids"], there["input_ids"]) and here["stats"] == there["stats"]


def test_pairs_are_padded_and_cut() -> None:
    samples = [sample("a", {"caption": "a red square"}), sample("b", {"caption": "the " * 9})]
    batch = batch_of(samples, pairs(wordpiece(), max_length=6))
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["pixel_values"].dtype == torch.uint8
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [5, 6]
    ids = wordpiece()(["a red square", "the the the the"])["input_ids"]
    assert batch["input_ids"].tolist() == [[*ids[0], 0], ids[1]]  # a cut caption keeps its [SEP]
    assert batch["stats"] == {"shapes": {"truncated": 1, "tokens": 11, "pictures": 2}}


def test_a_pairs_caption_is_drawn_by_the_seed() -> None:
    collate = pairs(llama_3())
    one = sample("a", {"caption": "a", "captions": ["red", "blue", "green"]})
    drawn = {}
    for seed in range(30):
        one.seed = seed
        drawn[seed] = tuple(collate.prepare(one).content[1])
        assert tuple(collate.prepare(one).content[1]) == drawn[seed]
    assert len(set(drawn.values())) == 3


def test_a_caption_with_a_token_that_the_encoder_lacks_is_an_error() -> None:
    size = len(llama_2()) - 1
    last = str(llama_2().convert_ids_to_tokens(size))
    few = PairCollate(ImageTextDataConfig(), llama_2(), SPEC, vocabulary=size)
    few.prepare(sample("a", {"caption": "red"}))
    drawn = Conditioning(None, llama_2(), 16, size)
    drawn(sample("a", {"caption": "red"}))
    for read in (few.prepare, drawn):
        with pytest.raises(SampleError) as caught:
            read(sample("a", {"caption": last}))
        assert caught.value.reason == "vocabulary"


def test_pairs_without_caption_or_image_are_errors() -> None:
    for one, reason in (
        (sample("a", {}), "no-caption"),
        (sample("a", {"caption": "a"}, image=False), "no-picture"),
    ):
        with pytest.raises(SampleError) as error:
            pairs(llama_3()).prepare(one)
        assert error.value.reason == reason


def test_augmentation_crops_and_never_mirrors() -> None:
    collate = pairs(llama_3(), ImageSpec(64), augment=True)
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64).contiguous()
    one = Sample("a", "s", {"caption": "a"}, [square(ramp)], seed=0)
    crops = []
    for seed in range(40):
        one.seed = seed
        crop, _ = collate.prepare(one).content
        assert crop.shape == ramp.shape and crop.dtype == torch.uint8
        assert torch.equal(crop, collate.prepare(one).content[0])
        assert (crop.int().diff(dim=-1) >= 0).all()  # brighter to the right, as before
        width = int(crop[0, 0].max()) - int(crop[0, 0].min())
        assert 0.7**0.5 * 252 - 8 <= width <= 252
        crops.append(crop)
    assert len({crop.numpy().tobytes() for crop in crops}) > 20
    assert torch.equal(ramp, torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64))


def test_pictures_of_questions_are_moved_and_nothing_is_cut_off() -> None:
    config = ImageTextDataConfig(max_length=120, augment=True, global_batch=1, micro_batch=1)
    collate = ChatCollate(config, Prompt(turns="caption"), llama_3(), ImageSpec(64, tokens=4))
    framed = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    framed[:, (0, -1)] = framed[:, :, (0, -1)] = 255
    one = Sample("a", "s", {"caption": "a"}, [square(framed, 4)], seed=0)
    seen = set()
    for seed in range(20):
        one.seed = seed
        (group,) = collate.prepare(one).content
        (picture,) = group.pictures
        rows, columns = (torch.where((picture.tiles[0, 0] > 180).any(axis))[0] for axis in (1, 0))
        height, width = (int(places[-1] - places[0]) + 1 for places in (rows, columns))
        assert height == width and 0.7 * 64**2 - 64 <= height**2 <= 64**2, "the whole picture is there"
        seen.add((int(rows[0]), int(columns[0]), height))
    assert len(seen) > 10
    assert framed[0, 1, 1] == 200 and framed[0, 0, 0] == 255
