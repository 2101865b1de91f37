"""The first place where two states of a run differ."""

import math

import pytest
import torch

from mmlab.training.resume_proof import difference

SAME = {
    "step": 3,
    "loss": math.nan,
    "loops": [{"done": True}, (1, "two")],
    "weights": torch.tensor([1.0, math.nan]),
    "identity": {"run": "a"},
    "callbacks": {"Checkpoints": {"metrics": {"perf/samples_per_s": 1.0, "train/loss": 2.0}}},
}


def test_what_is_the_same_does_not_differ():
    again = {**SAME, "loss": float("nan"), "weights": SAME["weights"].clone()}
    assert difference(SAME, again) is None
    faster = {"Checkpoints": {"metrics": {"perf/data_wait": 0.5, "train/loss": 2.0}}}
    assert difference(SAME, {**again, "callbacks": faster}) is None, "no two runs are equally fast"
    assert difference(SAME, {**again, "identity": {"run": "b", "commit": "c"}}) is None, "two runs have their own ids"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": 4}, "step: 3 and 4"),
        ({"step": 3.0}, "step: 3 and 3.0"),
        ({"loss": 1.0}, "loss: nan and 1.0"),
        ({"more": 1}, ": only one of them has 'more'"),
        ({"loops": [{"done": True}]}, "loops: 2 items and 1"),
        ({"loops": [{}, (1, "two")]}, "loops.0: only one of them has 'done'"),
        ({"loops": [{"done": True}, (1, "three")]}, "loops.1.1: 'two' and 'three'"),
        ({"weights": torch.tensor([1.0, 2.0])}, "weights: 1 of 2 numbers differ, by up to nan"),
        ({"weights": torch.tensor([1.5, math.nan])}, "weights: 1 of 2 numbers differ"),
        ({"weights": torch.tensor([1, 0])}, "weights: torch.float32 [2] and torch.int64 [2]"),
        ({"weights": torch.tensor([1.0, math.nan]).double()}, "weights: torch.float32 [2] and torch.float64 [2]"),
        ({"weights": torch.tensor([[1.0, math.nan]])}, "weights: torch.float32 [2] and torch.float32 [1, 2]"),
        ({"weights": [1.0, math.nan]}, "weights: "),
        ({"callbacks": {"Checkpoints": {"metrics": {"train/loss": 1.0}}}}, "callbacks.Checkpoints.metrics.train/loss"),
    ],
)
def test_the_first_place_is_named(change, says):
    other = {**SAME, **change}
    assert (difference(SAME, other) or "").startswith(says)
    assert difference(other, SAME) is not None
