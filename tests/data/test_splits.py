import random

from mmlab.data.splits import REST, digests_of, most_connected, representatives, split_of


def test_samples_that_share_a_picture_also_through_others_belong_together():
    draw = random.Random(0)
    samples = [[str(n) for n in draw.sample(range(60), draw.choice([1, 1, 2, 3]))] for _ in range(60)]
    groups = [{n} for n in range(len(samples))]  # by brute force
    for a, first in enumerate(samples):
        for b, second in enumerate(samples):
            if set(first) & set(second) and groups[a] is not groups[b]:
                groups[a] |= groups[b]
                for n in groups[b]:
                    groups[n] = groups[a]
    expected = [min(digest for n in groups[one] for digest in samples[n]) for one in range(len(samples))]
    assert representatives(samples) == expected
    assert most_connected(samples) == max(map(len, groups)) > 2 and most_connected([]) == 0
    assert representatives([["b"], ["a"], ["b"]]) == ["b", "a", "b"]


def test_a_sample_is_known_by_its_pictures_or_else_by_its_record():
    pictures = digests_of({"0.png": b"y", "jpg": b"x", "json": {"a": 1}})
    assert pictures == [*digests_of({"png": b"x"}), *digests_of({"jpg": b"y"})]
    assert digests_of({"json": {"a": 1, "b": 2}}) == digests_of({"json": {"b": 2, "a": 1}}) != digests_of({"json": {}})


def test_the_splits_get_their_shares():
    drawn = [split_of(str(n), {"val": 0.2, "test": 0.1}, 0) for n in range(2000)]
    assert 340 < drawn.count("val") < 460 and 150 < drawn.count("test") < 250 and REST in drawn
