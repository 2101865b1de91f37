"""Precision and recall, compared with the paper's definition written out and with sets whose answer is plain."""

import pytest
import torch

from mmlab.evaluate.pictures import precision_recall as module
from mmlab.evaluate.pictures.precision_recall import precision_recall


def normal(count: int, width: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def inside(x: torch.Tensor, y: torch.Tensor, k: int) -> float:
    """Share of x in the manifold of y, image by image (arXiv 1904.06991, algorithm 1)."""
    count = 0
    for one in x:
        for n, center in enumerate(y):
            others = torch.stack([(center - other).norm() for m, other in enumerate(y) if m != n])
            if (one - center).norm() <= others.sort().values[k - 1]:
                count += 1
                break
    return count / len(x)


@pytest.mark.parametrize("k", [1, 3])
def test_it_is_the_paper_s_definition(monkeypatch, k):
    monkeypatch.setattr(module, "CHUNK", 7)
    made, real = normal(20, 3, 1, 0.5), normal(26, 3, 2)
    found = precision_recall(made, real, k)
    assert found == {"precision": inside(made, real, k), "recall": inside(real, made, k)}
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1


def test_collapse_costs_recall_and_noise_costs_precision():
    real = normal(200, 4, 1)
    near_one = real[:1] + 0.01 * normal(200, 4, 2)
    collapsed, noise = precision_recall(near_one, real), precision_recall(normal(200, 4, 3, 30.0), real)
    assert collapsed["precision"] > 0.9 and collapsed["recall"] < 0.1
    assert noise == {"precision": 0, "recall": 0}
    # Far from the origin small distances are kept.
    assert precision_recall(near_one + 1e4, real + 1e4)["recall"] < 0.1
    assert precision_recall(real[torch.randperm(200)], real) == {"precision": 1, "recall": 1}


def test_three_images_have_no_third_neighbor():
    assert precision_recall(normal(3, 2, 1), normal(9, 2, 2)) == {}
    assert precision_recall(normal(4, 2, 1), normal(4, 2, 2)).keys() == {"precision", "recall"}
