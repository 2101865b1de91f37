import os
import random
from pathlib import Path

import pytest

from mmlab.config.errors import DataError
from mmlab.data.config import CacheConfig
from mmlab.data.remote.shard_cache import ShardCache
from mmlab.data.remote.wanted import Wanted


def shard(name: str, size: int = 10, hash: str = "h", **stated) -> Wanted:
    return Wanted("s3://bucket/laion", f"{name}.tar", size, hash=hash, **stated)


def arrive(cache: ShardCache, *wanted: Wanted) -> None:
    """What a download does."""
    for each in wanted:
        write(cache.path(each), each.size)
        cache.fetched(each)


def write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, size)


def fetch(cache: ShardCache) -> list[str]:
    """The names of all objects that are fetched now, in order."""
    names = []
    while wanted := cache.next_fetch():
        arrive(cache, wanted)
        names.append(wanted.name.partition(".")[0])
    return names


def there(cache: ShardCache, *wanted: Wanted) -> str:
    return "".join(each.name[0] for each in wanted if cache.find(each))


A, B, C, D, E, F = (shard(name) for name in "abcdef")
ALL = (A, B, C, D, E, F)


def test_present_blocks_of_all_clients_come_first_in_order(tmp_path):
    cache = ShardCache(tmp_path, 60)
    cache.want(1, [A, B], [C], [D])
    cache.want(2, [C, E], [F], [A])
    assert fetch(cache) == ["a", "c", "b", "e", "f", "d"]


def test_evicts_what_was_wanted_longest_ago_then_later_shards_then_next_ones_and_no_present_one(tmp_path):
    cache = ShardCache(tmp_path, 60)
    for wanted in (F, E, F):
        cache.want(1, [wanted], [], [])
        fetch(cache)
    cache.want(1, [A], [B], [C, D])
    fetch(cache)
    left = []
    for i in range(6):
        cache.want(2, [shard(f"new{j}") for j in range(i + 1)], [], [])
        fetch(cache)
        left.append(there(cache, *ALL))
    assert left == ["abcdf", "abcd", "abc", "ab", "a", "a"]


def test_of_what_is_left_together_the_last_goes_first(tmp_path):
    cache = ShardCache(tmp_path, 30)
    cache.want(1, [A], [B], [C])
    fetch(cache)
    cache.leave(1)
    left = []
    for i in range(3):
        cache.want(2, [shard(f"new{j}") for j in range(i + 1)], [], [])
        fetch(cache)
        left.append(there(cache, *ALL))
    assert left == ["ab", "a", ""]


def test_does_not_evict_a_sooner_shard_for_a_later_one(tmp_path):
    cache = ShardCache(tmp_path, 30)
    cache.want(1, [A], [B], [C, D, E])
    assert fetch(cache) == ["a", "b", "c"]
    cache.want(2, [], [], [C, F])
    assert fetch(cache) == [] and there(cache, *ALL) == "abc"


def test_does_not_evict_a_shard_for_one_of_the_same_use(tmp_path):
    cache = ShardCache(tmp_path, 10)
    for client, wanted in enumerate((A, B)):
        cache.want(client, [], [wanted], [])
    assert cache.next_fetch() == A
    arrive(cache, A)
    assert cache.next_fetch() is None and cache.find(A)


def test_present_blocks_that_do_not_fit_are_an_error_with_both_numbers(tmp_path):
    cache = ShardCache(tmp_path, 2 * 10**9)
    large = [shard(name, 1_500_000_000) for name in "ab"]
    with pytest.raises(
        DataError, match=r"take 3 GB, .* holds 2 GB; raise data\.cache\.gigabytes, or lower data\.block_shards\."
    ):
        cache.want(1, large, [], [])
    assert cache.next_fetch() is None
    for client, wanted in enumerate(large):
        cache.want(client, [wanted], [], [])  # each fits alone
    assert fetch(cache) == ["a"] and cache.next_fetch() is None and cache.present == 3 * 10**9
    cache.leave(0)
    assert fetch(cache) == ["b"]


def test_a_table_is_fetched_before_its_shard_and_stays_as_long(tmp_path):
    cache = ShardCache(tmp_path, 15)
    table = Wanted("s3://bucket/laion", "index/a.safetensors", 5, sha256="1")
    wanted = shard("a", table=table)
    cache.want(1, [], [], [wanted])
    assert cache.next_fetch() == table and cache.next_fetch() is None
    arrive(cache, table)
    assert cache.next_fetch() == wanted
    arrive(cache, wanted)
    cache.want(2, [B], [], [])
    assert fetch(cache) == ["b"] and cache.find(table) and not cache.find(wanted)
    assert cache.path(table).parent == cache.path(wanted).parent / "index"
    assert Wanted.from_json(wanted.as_json()) == wanted


def test_a_present_block_stops_downloads_whose_place_it_needs(tmp_path):
    cache = ShardCache(tmp_path, 30)
    cache.want(1, [], [A], [B, C])
    assert [cache.next_fetch() for _ in range(3)] == [A, B, C]
    cache.want(2, [D], [], [])
    assert cache.next_fetch() is None and [cache.is_cancelled(each) for each in (A, B, C)] == [False, False, True]
    cache.not_fetched(C, failed=False)
    assert cache.next_fetch() == D and cache.used == 30
    cache.leave(1)
    assert cache.is_cancelled(A) and not cache.is_cancelled(D)


def test_what_is_wanted_later_does_not_take_the_place_that_is_waited_for(tmp_path):
    cache = ShardCache(tmp_path, 30)
    cache.want(1, [A], [shard("large", 25)], [B])
    assert fetch(cache) == ["a"]
    cache.want(1, [], [], [A, B, C])
    assert cache.next_fetch() == B
    cache.want(2, [], [shard("large", 25)], [])
    assert cache.next_fetch() is None and cache.find(A) and not cache.is_cancelled(B)
    cache.not_fetched(B, failed=False)
    cache.want(1, [A], [B], [])
    cache.want(2, [shard("large", 25)], [], [])
    assert fetch(cache) == []


def test_a_failed_object_is_fetched_again_when_asked_again(tmp_path):
    cache = ShardCache(tmp_path, 30)
    cache.want(1, [A, B], [], [])
    assert cache.next_fetch() == A
    cache.not_fetched(A, failed=True)
    assert fetch(cache) == ["b"] and cache.used == 10
    cache.retry(A)
    assert cache.next_fetch() == A
    cache.not_fetched(A, failed=True)
    cache.want(1, [B], [], [])
    cache.want(1, [A, B], [], [])
    assert fetch(cache) == ["a"]


def test_takes_over_what_an_earlier_process_left(tmp_path):
    cache = ShardCache(tmp_path, 60)
    other = Wanted("gs://other", "z.tar", 20, hash="h")
    for time, wanted in enumerate((other, A, B)):
        cache.want(1, [wanted], [], [])
        fetch(cache)
        os.utime(cache.path(wanted), (time, time))
    part = cache.path(C).with_name(cache.path(C).name + ".part")
    write(part, 1000)
    names = ("mine.tar", "notes-0123456789abcdef/mine.tar", "notes/mine-0123456789abcdef.tar", "lock")
    foreign = [tmp_path / name for name in names]
    for path in foreign:
        write(path, 1000)

    again = ShardCache(tmp_path, 50)
    assert again.used == 40 and not part.exists()
    again.want(1, [A, C, D], [], [])
    assert fetch(again) == ["c", "d"] and there(again, A, B, C, D) == "abcd" and not again.find(other)
    assert ShardCache(tmp_path, 5).used == 0
    assert all(path.exists() for path in foreign)


def test_fetches_again_what_somebody_deleted_or_cut(tmp_path):
    cache = ShardCache(tmp_path, 60)
    cache.want(1, [A, B], [], [])
    fetch(cache)
    cache.path(A).unlink()
    os.truncate(cache.path(B), 4)
    assert there(cache, A, B) == "" and cache.used == 0
    assert fetch(cache) == ["a", "b"] and there(cache, A, B) == "ab"


def test_other_contents_under_the_same_name_are_another_file(tmp_path):
    cache = ShardCache(tmp_path, 60)
    cache.want(1, [A], [], [])
    fetch(cache)
    rebuilt = shard("a", hash="other")
    assert cache.find(rebuilt) is None and cache.path(rebuilt) != cache.path(A)
    assert cache.path(rebuilt).suffix == ".tar" and cache.path(rebuilt).name.startswith("a-")


def test_a_smaller_limit_evicts_all_but_present_blocks(tmp_path):
    cache = ShardCache(tmp_path, 60)
    cache.want(1, [A, B], [C], [D])
    fetch(cache)
    cache.set_limit(15)
    assert there(cache, *ALL) == "ab"


def test_holds_an_object_that_is_not_wanted(tmp_path):
    cache = ShardCache(tmp_path, 20)
    cache.hold(1, A)
    assert fetch(cache) == ["a"]
    cache.want(2, [B], [C], [])
    assert fetch(cache) == ["b"] and there(cache, A, B) == "ab"
    cache.hold(1, None)
    assert fetch(cache) == ["c"] and there(cache, A, B, C) == "bc"


@pytest.mark.parametrize("name", ["../a.tar", "/etc/a.tar", "a//b.tar", "a/./b.tar", "", "a\0.tar"])
def test_refuses_names_that_lead_elsewhere(name):
    with pytest.raises(DataError, match="cannot be the name of an object of s3://bucket"):
        Wanted("s3://bucket", name, 1)


def test_the_limit_and_present_blocks_hold_through_thousands_of_steps(tmp_path):
    draw = random.Random(0)
    shards = [shard(f"{i}-", draw.randint(1, 40), hash=str(i)) for i in range(60)]
    cache = ShardCache(tmp_path, 200)
    places = dict.fromkeys(range(4), 0)
    under_way: list[Wanted] = []
    pinned: dict[int, list[Wanted]] = {}
    evictions = 0

    def check() -> None:
        sizes = [path.stat().st_size for path in tmp_path.rglob("*.tar")]
        assert sum(sizes) + sum(each.size for each in under_way) == cache.used <= cache.limit
        assert all(cache.path(each).exists() for each in kept)

    for _ in range(4000):
        kept = {each for wanted in pinned.values() for each in wanted if cache.find(each)}
        action = draw.choices(["want", "start", "end", "leave", "delete", "restart"], [20, 40, 40, 2, 1, 0.3])[0]
        client = draw.choice(list(places))
        if action == "want":
            at = places[client] = (places[client] + draw.randint(0, 4)) % len(shards)
            block = [shards[(at + i) % len(shards)] for i in range(11)]
            kept -= set(pinned.pop(client, []))
            kept = kept | {each for wanted in pinned.values() for each in wanted if each in kept}
            try:
                cache.want(client, block[:4], block[4:8], block[8:])
                pinned[client] = block[:4]
            except DataError:
                assert sum(each.size for each in block[:4]) > cache.limit
        elif action == "start" and len(under_way) < 5 and (wanted := cache.next_fetch()):
            under_way.append(wanted)
        elif action == "end" and under_way:
            wanted = under_way.pop(draw.randrange(len(under_way)))
            if cache.is_cancelled(wanted) or draw.random() < 0.1:
                cache.not_fetched(wanted, failed=not cache.is_cancelled(wanted))
            else:
                arrive(cache, wanted)
        elif action == "leave":
            cache.leave(client)
            kept -= set(pinned.pop(client, []))
            kept = kept | {each for wanted in pinned.values() for each in wanted if cache.find(each)}
        elif action == "delete" and kept:
            wanted = draw.choice(sorted(kept, key=lambda each: each.name))
            cache.path(wanted).unlink()
            assert cache.find(wanted) is None
            kept -= {wanted}
        elif action == "restart":
            evictions += cache.evictions
            cache = ShardCache(tmp_path, cache.limit)
            under_way, pinned = [], {}
        check()
    assert evictions + cache.evictions > 100


def test_the_folder_is_the_setting_or_that_of_the_environment(monkeypatch):
    monkeypatch.delenv("MMLAB_SHARD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert CacheConfig().path == Path.home() / ".cache/mmlab/shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert CacheConfig().path == Path("/caches/mmlab/shards")
    monkeypatch.setenv("MMLAB_SHARD_CACHE", "/scratch")
    assert CacheConfig().path == Path("/scratch") and CacheConfig(folder="~/mine").path == Path.home() / "mine"
    assert CacheConfig(gigabytes=1.5).bytes == 1_500_000_000
