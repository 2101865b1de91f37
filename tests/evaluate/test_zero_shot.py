"""Classes by their names: accuracies equal those by hand, beside chance and the commonest class."""

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.data.config import ImageTextDataConfig
from mmlab.evaluate.image_text import Distinct, PairEncoder
from mmlab.evaluate.zero_shot import class_vectors, classes_of, confusion_sheet, zero_shot, zero_shot_table
from tests.stage.tiny_stage import dual_encoder

NAMES = ["bird", "cat", "cow", "dog", "fish", "horse", "mouse"]


def drawn(count: int, width: int = 4, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def images(classes: Sequence[str | None]) -> Distinct:
    return Distinct(list(range(len(classes))), drawn(len(classes))[:, None], classes=list(classes))


def test_accuracies_are_those_by_hand():
    labels = ["cat"] * 9 + ["dog"] * 6 + ["cow"] * 5 + ["bird", "bird", "fish", "horse"]
    distinct, vectors = images([*labels, None]), drawn(7, seed=1)
    names, labeled = classes_of(distinct, NAMES)
    result = zero_shot(distinct, names, labeled, vectors)
    assert names == NAMES and labeled == list(range(24))
    first: dict[str, list[bool]] = {}
    fifth = []
    for n, label in enumerate(labels):
        cosines = [float(distinct.images_NQE[n, 0] @ vector) for vector in vectors]
        order = sorted(range(7), key=lambda k: -cosines[k])
        first.setdefault(label, []).append(NAMES[order[0]] == label)
        fifth.append(label in [NAMES[k] for k in order[:5]])
        assert result["predicted"][n] == NAMES[order[0]]
    hits = [hit for each in first.values() for hit in each]
    assert 0 < sum(hits) < 24
    assert result["top1"] == pytest.approx(sum(hits) / 24) and result["top5"] == pytest.approx(sum(fifth) / 24)
    assert result["mean_per_class"] == pytest.approx(sum(sum(each) / len(each) for each in first.values()) / 6)
    assert result["chance"] == {"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7}
    majority = result["majority"]
    assert (majority["class"], majority["top1"], majority["mean_per_class"]) == ("cat", 9 / 24, 1 / 6)
    assert majority["top5"] == 23 / 24, "the five commonest classes"
    assert result["per_class"]["mouse"] == {"images": 0, "top1": None, "top5": None, "mistaken_for": None}
    assert sum(map(sum, result["confusion"])) == 24
    assert sum(result["confusion"][k][k] for k in range(7)) == sum(hits)
    table = zero_shot_table(result).splitlines()
    assert table[2].split() == ["chance", "14.29%", "71.43%", "14.29%"]
    assert not any(line.startswith("mouse") for line in table), "no image shows one"
    shares = [float(line.split()[2].rstrip("%")) for line in table[4:]]
    assert shares == sorted(shares) and confusion_sheet(result, "a table").size > (300, 300)


def test_equal_vectors_are_never_right():
    distinct = images(["cat", "dog"])
    result = zero_shot(distinct, ["cat", "dog"], [0, 1], drawn(1).expand(2, 4))
    assert result["top1"] == result["mean_per_class"] == 0 and result["predicted"] == ["dog", "cat"]
    assert result["top5"] is None and result["majority"]["top1"] == 0.5, "of two classes the first five are all"


def test_numbers_are_looked_up_among_the_names():
    assert classes_of(images(["1", "0", None]), ["cat", "dog"]) == (["cat", "dog"], [0, 1])
    result = zero_shot(images(["1", "0"]), ["cat", "dog"], [0, 1], drawn(2, seed=1))
    assert [row["images"] for row in result["per_class"].values()] == [1, 1]
    assert classes_of(images(["b", "a", "b"]), []) == (["a", "b"], [0, 1, 2])
    with pytest.raises(ConfigError, match=r"classes: There is no class 'dogs'.*Did you mean 'dog'"):
        classes_of(images(["dogs"]), ["cat", "dog"])


def test_many_classes_are_drawn_as_those_with_the_most_mistakes():
    names = [f"class {n}" for n in range(60)]
    distinct = images(names)
    result = zero_shot(distinct, names, list(range(60)), distinct.images_NQE[:, 0])
    assert result["top1"] == 1
    assert confusion_sheet(result, "all").size == confusion_sheet({**result, "x": 0}, "all").size
    assert confusion_sheet(result, "").height < 60 * 34


def test_a_class_is_the_mean_of_its_prompts(tokenizer_folder):
    torch.manual_seed(0)
    data = ImageTextDataConfig(max_length=32, aspect="pad", global_batch=1, micro_batch=1)
    encoder = PairEncoder(dual_encoder(tokenizer_folder).eval(), data)
    prompts, texts = ["a photo of a {}.", "one {}"], ["a photo of a red circle.", "one red circle"]
    both = class_vectors(encoder, ["red_circle", "cat"], prompts)
    single = encoder.texts([encoder.tokens(text) for text in texts], 1)
    assert torch.allclose(both[0], F.normalize(single.mean(0), dim=-1), atol=1e-6)
    assert torch.allclose(both.norm(dim=-1), torch.ones(2))
    encoder.collate.vocabulary = 5
    with pytest.raises(ConfigError, match=r"a class cannot be read as text: The model has 5 tokens, and"):
        class_vectors(encoder, ["cat"], prompts)
