"""wandb's files: read, written, put together and cut."""

import random

import pytest

from mmlab.training.wandb_files import (
    BLOCK,
    cut_overlaps,
    find_segments,
    read_records,
    read_segment,
    write_records,
)
from tests.tiny_wandb import history, write_segment


def losses(*steps: int, scale: float = 1.0) -> dict[int, dict[str, float]]:
    return {step: {"loss": step * scale} for step in steps}


def test_records_of_every_size_at_every_place_of_a_block(tmp_path):
    drawn = random.Random(0)
    sizes = [0, 1, BLOCK - 7, BLOCK - 14, BLOCK, 3 * BLOCK, 5, 0, 7]
    sizes += [drawn.randrange(9000) for _ in range(60)]
    records = [drawn.randbytes(size) for size in sizes]
    file = tmp_path / "x.wandb"
    file.write_bytes(write_records(records))
    assert list(read_records(file)) == records


def test_a_file_is_read_up_to_what_is_broken(tmp_path):
    file = tmp_path / "x.wandb"
    data = bytearray(write_records([b"a" * 100, b"b" * 100, b"c" * 100]))
    file.write_bytes(data[:-1])
    assert len(list(read_records(file))) == 2
    data[150] ^= 1
    file.write_bytes(data)
    assert list(read_records(file)) == [b"a" * 100]
    file.write_bytes(b"something else")
    assert list(read_records(file)) == []


def test_a_segment(tmp_path):
    file = write_segment(tmp_path, 5, {1: {"loss": 2.0, "picture|path": "a.png"}, 3: {"loss": 1.0}}, ended=False)
    segment = read_segment(file)
    assert segment is not None and (segment.id, segment.started, segment.ended) == ("r-1", 5, False)
    assert segment.config == {"optim": {"lr": 0.1}}
    assert segment.rows == {1: {"loss": 2.0, "picture": {"path": "a.png"}}, 3: {"loss": 1.0}}
    assert segment.offline and not segment.synced


def test_segments_come_in_the_order_of_their_starts(tmp_path):
    write_segment(tmp_path, 20, losses(3, 4, 5))
    write_segment(tmp_path, 10, losses(1, 2, 3, 4, 5, 6), ended=False)
    (tmp_path / "wandb" / "latest-run").symlink_to("offline-run-10-r-1")
    write_segment(tmp_path, 15, {})
    assert steps(tmp_path) == [[1, 2, 3, 4, 5, 6], [], [3, 4, 5]]
    assert find_segments(tmp_path / "wandb") == []


def steps(folder) -> list[list[int]]:
    return [list(segment.rows) for segment in find_segments(folder)]


def test_overlaps_are_cut_from_the_earlier_one(tmp_path):
    for started, rows in ((1, losses(1, 2, 3, 4)), (2, losses(3, 4, 5, 6)), (3, losses(5, 6, 7))):
        write_segment(tmp_path, started, rows)
    before = history(tmp_path)
    cut_overlaps(tmp_path)
    assert steps(tmp_path) == [[1, 2], [3, 4], [5, 6, 7]]
    assert history(tmp_path) == before
    assert not list(tmp_path.rglob("*.cut"))


@pytest.mark.parametrize("online", [False, True])
def test_what_was_pushed_stays_and_later_ones_are_cut(tmp_path, online):
    file = write_segment(tmp_path, 1, losses(1, 2, 3, 4), online=online)
    if not online:
        file.with_suffix(".wandb.synced").touch()
    write_segment(tmp_path, 2, losses(3, 4, 5, 6))
    write_segment(tmp_path, 3, losses(6, 7))
    cut_overlaps(tmp_path)
    assert steps(tmp_path) == [[1, 2, 3, 4], [5], [6, 7]]
