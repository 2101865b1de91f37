from dataclasses import replace

from mmlab.config.locations import Url
from mmlab.data.shard_files import ShardWriter
from mmlab.data.subsets import FEW, drawn, evenly_spaced, shown


def test_evenly_spaced():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9] and evenly_spaced(10, 1) == [0] and evenly_spaced(10, 0) == []
    assert list(evenly_spaced(3, 3)) == list(evenly_spaced(3, 9)) == [0, 1, 2] and not evenly_spaced(0, 5)
    assert evenly_spaced(1 << 50, 1 << 60) == range(1 << 50)


def test_drawn_numbers_are_spread_and_depend_on_the_seed():
    assert drawn(13_000, 32, 5) == drawn(13_000, 32, 5) != drawn(13_000, 32, 6)
    for seed in range(20):
        for total, count in ((13_000, 32), (10, 7), (9, 8)):
            numbers = drawn(total, count, seed)
            parts = [next(n for n in range(count) if number < (n + 1) * total // count) for number in numbers]
            assert parts == list(range(count))
    assert {number for seed in range(200) for number in drawn(10, 3, seed)} == {*range(10)}
    assert list(drawn(5, 5, 0)) == list(drawn(5, 9, 0)) == [0, 1, 2, 3, 4]


def test_samples_of_a_remote_set_are_in_few_shards(tmp_path):
    with ShardWriter(tmp_path / "set", max_samples=3, quiet=True) as writer:
        for n in range(30):
            writer.write(f"{n:02d}", {"txt": "x"})
    local, remote = writer.index, replace(writer.index, root=Url("s3://bucket/set"))
    assert shown(local, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    places = shown(remote, 10)
    assert len(places) == 10 == len({*places}) and {remote.place(i)[0] for i in places} == {0, 3, 6, 9}
    assert len({remote.place(i)[0] for i in shown(remote, 100)}) == FEW and shown(remote, 1) == [0]
