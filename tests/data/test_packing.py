"""Where the pictures of a batch stand, and what each of their places takes."""

import random
from contextlib import suppress

import pytest
import torch

from mmlab.data.config import Prompt
from mmlab.data.conversation import encode
from mmlab.data.dialogues import conversations_of
from mmlab.data.packing import Shown, place_pictures
from mmlab.data.sample_types import NEWLINE, ImageSpec, Picture, Sample, SampleError
from tests.data.test_collate import chat, seen_by, talk

FEATURES = 4


def picture(tiles: int, places: list[int], color: int = 0) -> Picture:
    return Picture(torch.full((tiles, 3, 2, 2), color, dtype=torch.uint8), torch.tensor(places))


def test_each_place_takes_a_feature_of_its_own_picture():
    wide = picture(3, [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, NEWLINE], color=1)
    square = picture(1, [0, 1, 2, 3], color=2)
    batch = place_pictures([Shown(wide, 1, 5, "a"), Shown(square, 0, 2, "b"), Shown(wide, 0, 9, "c")], FEATURES, 2)
    colors = batch["pixel_values"][:, 0, 0, 0].tolist()
    assert colors == [1, 1, 1, 2, 1, 1, 1]
    features = torch.arange(len(colors) * FEATURES + 1)
    features[-1] = -7
    row = torch.full((2, 20), -1)
    row.index_put_(batch["image_positions"].unbind(1), features[batch["image_features"]])
    own = [0, 1, 2, 3, 4, 5, 8, 9, -7, 6, -7]
    assert row[1].tolist() == [-1] * 5 + own + [-1] * 4
    assert row[0].tolist() == [-1] * 2 + [12, 13, 14, 15] + [-1] * 3 + [n + 16 if n >= 0 else n for n in own]


def test_without_a_picture_there_are_no_places():
    batch = place_pictures([], FEATURES, 2)
    assert batch["pixel_values"].shape == (0, 3, 2, 2) and batch["image_positions"].shape == (0, 2)
    assert batch["image_features"].shape == (0,) and batch["image_keys"] == []


def test_no_tile_has_the_key_of_another_sample():
    """Keys may have folders, with a dot too: features are cached by key."""
    keys = ["a", "a.1", "a/1", "a.1/1", "a.tile1/b", "a/tile1"]  # the second one is a sample's second picture
    shown = [Shown(picture(3, [0]), n, 0, key) for n, key in enumerate(keys)]
    tiles = place_pictures(shown, FEATURES, 2)["image_keys"]
    assert len(set(tiles)) == len(tiles) == 18 and tiles[::3] == keys


def coded(key: int, tiles: int) -> Picture:
    """A picture whose tiles state by their color which they are; of several, every third feature is a newline."""
    colors = torch.arange(tiles) + 8 * key
    places = torch.arange(tiles * FEATURES)
    shown = torch.where(places % 3 == 2, NEWLINE, places) if tiles > 1 else places
    return Picture(colors.to(torch.uint8)[:, None, None, None].expand(tiles, 3, 4, 4).contiguous(), shown)


def mixed(count: int) -> list[Sample]:
    """Samples with 0 to 3 pictures of 1 to 4 tiles, marked in one turn, in two, or not at all."""
    draw, samples = random.Random(0), []
    for n in range(count):
        pictures = [coded(4 * n + k, draw.randint(1, 4)) for k in range(n % 4)]
        marks = ["<image>"] * len(pictures)
        record: dict = talk("Hello", "Good day.")
        if len(pictures) == 1:
            record = {"questions": [{"question": f"Is it {i}?", "answer": f"no {i}"} for i in range(3)]}
        elif pictures and n % 3 == 0:
            record = {"questions": [{"question": f"Which {i}?", "answer": f"the {i}"} for i in range(3)]}
        elif pictures and n % 3 == 1:
            record = talk(f"Is {' like '.join(marks)}?", "Yes.", "Sure?", "No.")
        elif pictures:
            record = talk(f"{marks[0]} What?", "A cat. " * draw.randint(1, 9), f"And {' or '.join(marks[1:])}?", "No.")
        samples.append(Sample(f"k{n}", "s", record, pictures, n))
    return samples


@pytest.mark.parametrize(("pack", "length"), [(False, 400), (True, 400), (True, 70)])
def test_every_dialogue_sees_its_own_pictures_at_their_places(pack, length):
    """Rebuilt from the batch as the last token of each dialogue sees it, and compared with the dialogue alone."""
    prompt = Prompt("v1", system="Look.")
    collate = chat(prompt, ImageSpec(4, "anyres", FEATURES, ((1, 1), (1, 3))), max_length=length, pack=pack)
    samples, expected, contents = mixed(24), [], []
    for one in samples:
        with suppress(SampleError):  # none of its questions fits
            contents.append(collate.prepare(one).content)
        for dialogue in conversations_of(one.record, prompt, one.seed, len(one.pictures)):
            try:
                segment = encode(dialogue, prompt, collate.tokenizer, collate.places(one), length)
            except SampleError:
                continue
            codes = [0] * len(segment)
            for n, start in enumerate(segment.image_starts):
                tiles, places = one.pictures[n].tiles[:, 0, 0, 0], one.pictures[n].places.tolist()
                own = [-7 if p == NEWLINE else int(tiles[p // FEATURES]) * FEATURES + p % FEATURES + 1 for p in places]
                codes[start : start + len(own)] = own
            expected.append(list(zip(segment.input_ids, codes, segment.labels, strict=True)))
    batch = collate.batch(contents)
    colors = batch["pixel_values"][:, 0, 0, 0].long()
    features = torch.cat([(colors[:, None] * FEATURES + torch.arange(FEATURES) + 1).reshape(-1), torch.tensor([-7])])
    codes = torch.zeros_like(batch["input_ids"])
    codes.index_put_(batch["image_positions"].unbind(1), features[batch["image_features"]])
    found = []
    for row, segments in enumerate(batch["segment_ids"]):
        sees, contexts = seen_by(batch, row), set(batch["context_ids"][row].tolist()) - {0}
        for segment in sorted(set(segments.tolist()) - {0} - contexts):
            visible = sees[int((segments == segment).nonzero()[-1])].nonzero()[:, 0]
            assert batch["position_ids"][row][visible].tolist() == list(range(len(visible)))
            columns = [one[row][visible].tolist() for one in (batch["input_ids"], codes, batch["labels"])]
            found.append(list(zip(*columns, strict=True)))
    for one in (*found, *expected):  # nothing is predicted across segments
        one[0] = (*one[0][:2], 0)
    unlabeled = [[token[:2] for token in one] for one in found]
    assert sorted(unlabeled) == sorted([token[:2] for token in one] for one in expected)
    assert {code for one in found for _, code, _ in one} > {-7, 0}
    keys = batch["image_keys"]
    assert len(keys) == len(colors) and len({*zip(keys, colors.tolist(), strict=True)}) == len(set(keys))
    assert (len(batch["input_ids"]) < len(contents)) == (pack and length > 100) and len(contents) > 12


def test_questions_about_several_pictures_share_them():
    (one,) = [one for one in mixed(8) if len(one.pictures) == 2 and "questions" in one.record]
    collate = chat(Prompt("v1", system="Look."), ImageSpec(4, "anyres", FEATURES, ((1, 3),)), max_length=400)
    prepared = collate.prepare(one)
    (group,) = prepared.content
    assert group.shared and len(group.segments) == 4 and prepared.counters["pictures"] == 2
    assert [len(segment.image_starts) for segment in group.segments] == [2, 0, 0, 0]
