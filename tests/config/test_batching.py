import pytest

from mmlab.config.errors import ConfigError
from mmlab.runs.ranks import accumulation


def test_accumulation_fills_the_global_batch():
    assert accumulation(128, 32, 1) == 4
    assert accumulation(128, 32, 4) == 1
    assert accumulation(8, 1, 2) == 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((128, 48, 1), "micro_batch=64"),  # 32 and 64 are as near: the larger is the faster
        ((128, 64, 4), "micro_batch=32"),
        ((100, 30, 2), "micro_batch=25"),
        ((130, 32, 4), "global_batch=128 or 132"),
        ((3, 1, 4), "global_batch=4"),
        ((0, 1, 1), "global_batch=0"),
        ((8, 0, 1), "micro_batch=0"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_nearest_that_does(given, says):
    with pytest.raises(ConfigError, match=says):
        accumulation(*given)
