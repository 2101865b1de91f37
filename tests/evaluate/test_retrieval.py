"""Recall of captions and images equals that of a search by hand; ties, equal captions and equal images are fair."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmlab.config.errors import DataError
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate import retrieval
from mmlab.evaluate.image_text import Distinct, PairEncoder, captions_of, read_distinct, similarity
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.retrieval import AT, chance, directions, image_sheet, retrieval_scores, retrieval_table, text_sheet
from tests.model import tiny
from tests.stage.tiny_stage import dual_encoder
from tests.tiny_shapes import make_records

DATA = ImageTextDataConfig(max_length=32, aspect="pad", global_batch=1, micro_batch=1)
RECORDS = [
    {"captions": ["a red circle", "something round"], "class": "circle"},
    {"caption": "a blue square", "class": "square"},
    {"caption": "a blue square", "class": "square"},
    {"captions": ["a green star", "a blue square"], "class": "star"},
    {"class": "star"},
    {"caption": "the same red circle again", "class": "circle"},
]


def picture(n: int) -> bytes:
    pixels = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def pictures_of(root: Path, records=RECORDS, numbers=(0, 1, 2, 3, 4, 0)) -> PictureSet:
    """Shards of records; the last image of `RECORDS` is the same as the first one."""
    make_records(root, records, [picture(n) for n in numbers])
    return PictureSet(root, ImageSpec(16, "pad"))


def vectors(count: int, width: int = 4, queries: int | None = None, seed: int = 0) -> torch.Tensor:
    shape = (count, width) if queries is None else (count, queries, width)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=-1)


def by_hand(images, texts, pairs, k: int) -> tuple[float, float]:
    """Recalls of both directions by sorting whole lists in plain Python; every caption is a query."""

    def cosine(i: int, j: int) -> float:
        return max(sum(float(a) * float(b) for a, b in zip(one, texts[j], strict=True)) for one in images[i])

    asked = sorted({i for i, _ in pairs})
    hits = 0
    for i in asked:
        nearest = sorted(range(len(texts)), key=lambda j: -cosine(i, j))[:k]
        hits += any((i, j) in pairs for j in nearest)
    found = total = 0
    for (_, j), count in pairs.items():
        nearest = sorted(range(len(images)), key=lambda n: -cosine(n, j))[:k]
        found, total = found + count * any((n, j) in pairs for n in nearest), total + count
    return hits / len(asked), found / total


@pytest.mark.parametrize("queries", [1, 3])
def test_recall_is_that_of_a_search_by_hand(queries, monkeypatch):
    pairs = {(n, n): 1 for n in range(12)} | {(n, 12 + n // 2): 1 for n in range(12)} | {(3, 7): 2, (9, 14): 1}
    pairs |= {(n, 17 + n): 1 for n in (1, 2)}
    images, texts = vectors(16, queries=queries), vectors(20, seed=1)
    distinct = Distinct(list(range(16)), images, [(n,) for n in range(20)], [f"text {n}" for n in range(20)], pairs)
    whole = retrieval_scores(distinct, directions(distinct, texts))
    monkeypatch.setattr(retrieval, "CHUNK", 50)  # two or three queries at a time
    found = directions(distinct, texts)
    scores = retrieval_scores(distinct, found)
    assert scores == whole, "chunks change nothing"
    for k in AT:
        expected = by_hand(images.tolist(), texts.tolist(), pairs, k)
        assert scores["image_to_text"][f"r@{k}"] == pytest.approx(expected[0])
        assert scores["text_to_image"][f"r@{k}"] == pytest.approx(expected[1])
    assert scores["captions"] == sum(pairs.values()) and scores["distinct_captions"] == 20
    nearest = similarity(images, texts).argsort(1, descending=True)[:12, :5]
    assert torch.equal(found[0].nearest[:12], nearest)


def test_a_model_that_says_the_same_of_everything_finds_nothing():
    same = vectors(1).expand(6, 4)
    distinct = Distinct(
        list(range(6)), same[:, None], [(n,) for n in range(6)], list("abcdef"), {(n, n): 1 for n in range(6)}
    )
    scores = retrieval_scores(distinct, directions(distinct, same))
    for direction in ("image_to_text", "text_to_image"):
        assert scores[direction]["r@1"] == scores[direction]["r@5"] == 0 and scores[direction]["median_rank"] == 6
        assert scores[direction]["r@10"] == 1, "of six, the tenth is reached"


def test_chance_is_the_share_of_shuffles_that_find_a_right_one():
    assert chance(1, 50, 5) == pytest.approx(0.1) and chance(3, 3, 1) == 1 and chance(1, 4, 10) == 1
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(4000):
        hits += bool((torch.randperm(12, generator=generator)[:5] < 2).any())
    assert chance(2, 12, 5) == pytest.approx(hits / 4000, abs=0.02)


@pytest.mark.parametrize("kind", ["dual", "qformer"])
def test_equal_captions_and_equal_images_are_one(tmp_path, tokenizer_folder, kind):
    torch.manual_seed(0)
    make = dual_encoder if kind == "dual" else tiny.image_text_qformer
    model: Any = make(tokenizer_folder).eval()
    encoder = PairEncoder(model, DATA)
    pictures = pictures_of(tmp_path)
    distinct = read_distinct(pictures, encoder, batch_size=4)
    assert distinct.samples == 6 and distinct.places == [0, 1, 2, 3, 4]
    assert distinct.classes == ["circle", "square", "square", "star", "star"]
    texts = ["a red circle", "something round", "a blue square", "a green star", "the same red circle again"]
    assert distinct.texts == texts and distinct.captions == 7
    right = {(0, 0), (0, 1), (1, 2), (2, 2), (3, 3), (3, 2), (0, 4)}
    assert set(distinct.pairs) == right, (
        "a caption is right for every image that has it, and those of one image are all its"
    )
    texts_ME = encoder.texts(distinct.tokens, batch_size=2)
    # What training compares: the same vectors, in the order of the texts, which were sorted by length.
    batch = encoder.collate.padded([list(tokens) for tokens in distinct.tokens])
    pixels = torch.stack([pictures.picture(n) for n in range(5)])
    with torch.no_grad():
        if kind == "dual":
            images, expected = model(pixels, batch["input_ids"][:5], batch["attention_mask"][:5])
            logits = images @ expected.T
        else:
            logits = model.similarities(model.vision(pixels), batch["input_ids"], batch["attention_mask"])
            logits = logits * model.contrast.log_temperature.exp()
    assert torch.allclose(similarity(distinct.images_NQE, texts_ME), logits, atol=1e-5)


def test_records_that_cannot_be_used_are_counted(tmp_path, tokenizer_folder):
    torch.manual_seed(0)
    encoder = PairEncoder(
        dual_encoder(tokenizer_folder).eval(),
        ImageTextDataConfig(max_length=8, aspect="pad", global_batch=1, micro_batch=1),
    )
    records = [{"caption": "one"}, {"caption": "two"}, {"caption": 5}]
    make_records(tmp_path, records, [picture(0), b"\x89PNG\r\n\x1a\nbroken", picture(2)])
    pictures = PictureSet(tmp_path, encoder.spec)
    distinct = read_distinct(pictures, encoder, 2)
    assert len(pictures.bad) == 1 and distinct.texts == ["one"] and len(distinct.places) == 2
    assert captions_of({"captions": ["", 3], "caption": "x"}) == ["x"] and captions_of({"captions": "abc"}) == []
    with pytest.raises(DataError, match="no images"):
        make_records(tmp_path / "none", [{"caption": "x"}], [None])
        read_distinct(PictureSet(tmp_path / "none", encoder.spec), encoder, 2)


def test_the_sheets_show_what_was_found(tmp_path):
    pictures = pictures_of(tmp_path)
    list(pictures.batches(8, "reading"))
    images = vectors(5)[:, None]
    pairs = {(n, n): 1 for n in range(5)}
    distinct = Distinct([0, 1, 2, 3, 4], images, [(n,) for n in range(5)], [f"text {n}" for n in range(5)], pairs)
    found = directions(distinct, images[:, 0])
    assert (found[0].ranks == 1).all() and (found[1].ranks == 1).all()
    rows, columns = (
        text_sheet(pictures, distinct, found[0], "texts"),
        image_sheet(pictures, distinct, found[1], "images"),
    )
    assert rows.width > 1000 and columns.height > 5 * 160
    table = retrieval_table(json.loads(json.dumps(retrieval_scores(distinct, found))))
    assert [line.split()[:4] for line in table.splitlines()[1:3]] == [
        ["image", "to", "text", "100.00%"],
        ["chance", "20.00%", "100.00%", "100.00%"],
    ]
