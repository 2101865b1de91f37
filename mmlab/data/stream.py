"""Samples of shards without an index, by webdataset's pipeline: a function of seed, rank, worker, pass and count.

Each worker of each rank is a lane: it has its own share of the shards in every pass, as `wds.split_by_node` and
`wds.split_by_worker` deal them, and reads them in blocks. A block is one `wds.DataPipeline`, with a shuffle buffer that
is empty at its start and at its end. So three numbers are the place in a stream: pass, block, and samples of the block.
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.shardlists import SimpleShardList

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Location, Url, is_url
from mmlab.data.bad_samples import sample_errors
from mmlab.data.config import FLOOR, ShardsConfig, StreamLoaderConfig
from mmlab.data.counters import DataReport
from mmlab.data.formats import record_type
from mmlab.data.mixture import Mixture
from mmlab.data.order import keyed_seed, permutation, sample_seed, source_seed
from mmlab.data.reader import TRIES, Collate, GlobalBatches, decoded, members_read
from mmlab.data.sample_types import Sample, SampleError
from mmlab.data.scan_notes import ScanNotes
from mmlab.data.tar_samples import OpenTar, StoredSample
from mmlab.runs.shard_patterns import named_shards, set_name

if TYPE_CHECKING:
    from mmlab.data.remote.remote_tars import RemoteTars

PLACES = "places"
"""Key of a batch: the number of the micro-batch, and where the streams of its lane are after it."""
INITIAL = 100
"""Samples in the buffer before the first one is drawn; it grows to its full size while samples are drawn."""

Place = list[int]
"""Pass, block in it, and samples of the block that were drawn."""


@dataclass(frozen=True)
class StreamSource:
    """One source of a mixture: its shards in the order in which they are named."""

    name: str
    shards: Sequence[Location]
    weight: float | None = None
    caption: str | None = None

    @cached_property
    def hash(self) -> str:
        """sha256 over names and, of local shards, sizes."""
        sizes = (str(os.path.getsize(shard)) if isinstance(shard, Path) else "" for shard in self.shards)
        lines = (f"{shard.name}\0{size}\n" for shard, size in zip(self.shards, sizes, strict=True))
        return sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def open_streams(config: ShardsConfig) -> list[StreamSource]:
    """The training sources.

    Raises:
        ConfigError: see `named_shards`; or two sources of one name.
    """
    sources: list[StreamSource] = []
    for source in config.train:
        shards = named_shards(source.path, config.root)
        name = source.name or set_name(shards)
        if any(name == other.name for other in sources):
            raise ConfigError(f"two sources are named '{name}'; give each its own `name`.")
        sources.append(StreamSource(name, shards, source.weight, source.caption))
    return sources


class SourceStream:
    """The samples of a source in one lane, without an end.

    Args:
        source: the source.
        lane: of this worker, `rank + world * worker`.
        lanes: of all workers of all ranks.
        config: settings of the data.
        place: where to continue.
        remote: opens copies of remote shards; None: all are local.

    Attributes:
        place: after the samples so far.
    """

    def __init__(
        self,
        source: StreamSource,
        lane: int,
        lanes: int,
        config: ShardsConfig,
        place: Place,
        remote: "RemoteTars | None" = None,
    ):
        self.source, self.lane, self.lanes, self.remote = source, lane, lanes, remote
        self.loader: StreamLoaderConfig = config.loader
        self.block_shards = config.block_shards
        self.seed = source_seed(config.seed, source.name)
        self.place = list(place)
        self._samples = self._block()
        skipped = sum(1 for _ in islice(self._samples, self.place[2]))
        if skipped < self.place[2]:
            raise DataError(f"source '{source.name}' has fewer samples than when the checkpoint was made.")

    def __next__(self) -> StoredSample:
        """The next sample; raises DataError for a damaged shard, or if there are none in any shard of the lane."""
        empty = 0
        while (sample := next(self._samples, None)) is None:
            empty += self.place[2] == 0
            if empty > len(self.source.shards):
                instead = ScanNotes.of(self._open(self.source.shards[0]).foreign(), {}, Counter()).instead()
                raise DataError(f"source '{self.source.name}': its shards hold no samples{instead}.")
            self.place = [*self._next_block(), 0]
            self._samples = self._block()
        self.place[2] += 1
        return sample

    def _shards(self, turn: int, block: int) -> list[Location]:
        """The shards of a block; none after the last block of a pass."""
        number, first = len(self.source.shards), block * self.block_shards
        if self.loader.resampled:
            draws = range(first, first + self.block_shards)
            return [self.source.shards[keyed_seed("draw", self.seed, self.lane, turn, n) % number] for n in draws]
        order = permutation(number, "shards", self.seed, turn) if self.loader.shardshuffle else range(number)
        mine = order[self.lane :: self.lanes][first : first + self.block_shards]
        return [self.source.shards[int(n)] for n in mine]

    def _next_block(self) -> tuple[int, int]:
        turn, block, _ = self.place
        return (turn, block + 1) if self._shards(turn, block + 1) else (turn + 1, 0)

    def _block(self) -> Iterator[StoredSample]:
        """The samples of the present block, from its start."""
        turn, block, _ = self.place
        shards = self._shards(turn, block)
        if self.remote is not None:
            self.remote.want(self, shards, self._shards(*self._next_block()))
        buffer = None
        if self.loader.shuffle:
            rng = random.Random(keyed_seed("buffer", self.seed, self.lane, turn, block))
            buffer = shuffle(self.loader.shuffle, initial=INITIAL, rng=rng)
        return iter(DataPipeline(SimpleShardList(list(map(str, shards))), self._expanded, buffer))

    def _expanded(self, shards: Iterable[dict[str, str]]) -> Iterator[StoredSample]:
        """The stage in place of webdataset's reader of tars, which ends a damaged shard without an error."""
        for shard in shards:
            yield from self._open(Url(shard["url"]) if is_url(shard["url"]) else Path(shard["url"])).samples()

    def _open(self, shard: Location) -> OpenTar:
        if isinstance(shard, Path):
            return OpenTar(shard, shard)
        assert self.remote is not None
        return self.remote.open(shard)


class StreamBatches(Dataset):
    """Map-style dataset whose item m is this rank's m-th collated batch; those of one lane must be asked for in order.

    Micro-batch m belongs to worker `m % workers`, in whichever process. A batch has the keys of `LocalBatches` and
    `PLACES`: (m, source → place after it). The reported key of a bad sample begins with its shard.

    Args:
        sources: the open sources.
        collate: prepares samples and makes batches of them.
        cut: the positions of each item, which decide on sources and seeds.
        config: settings of the data.

    Raises:
        ConfigError: fewer shards than workers of all ranks, unless they are resampled.
        DataError: a damaged shard, no usable sample in `TRIES` tries, or far more replacements than the budget allows.
    """

    def __init__(self, sources: Sequence[StreamSource], collate: Collate, cut: GlobalBatches, config: ShardsConfig):
        self.sources, self.collate, self.cut, self.config = list(sources), collate, cut, config
        self.workers = max(1, config.workers)
        for source in self.sources:
            config.check_lanes(source.name, len(source.shards), cut.world)
        weights = [source.weight for source in self.sources if source.weight is not None]
        self.mixture = Mixture([1] * len(self.sources), weights or None)
        self._guard = DataReport(config.bad_budget, FLOOR, slack=10)
        self.remote = _remote(self.sources, config)
        self.start(0, [])

    def start(self, first: int, places: Sequence[dict[str, Place]]) -> None:
        """Set the first item, and the places of each worker's streams; without them, at the start of the streams."""
        self.first, self.places = first, list(places)
        self._due: dict[int, int] = {}
        self._streams: dict[int, list[SourceStream]] = {}

    def __getitem__(self, m: int) -> dict[str, Any]:
        counters: dict[str, Counter[str]] = defaultdict(Counter)
        bad: list[dict[str, Any]] = []
        keys, contents = [], []
        before = self.remote.waited if self.remote is not None else 0.0
        if self.remote is not None:
            self.remote.renew()
        streams = self._lane(m)
        for position in self.cut.positions(m):
            key, content = self._item(streams, position, counters, bad)
            keys.append(key)
            contents.append(content)
        report: dict[str, Any] = {"stats": {source: dict(counts) for source, counts in counters.items()}, "bad": bad}
        self._guard.add(report)
        self._guard.check()
        if self.remote is not None:
            report["waited"] = self.remote.waited - before
        places = {stream.source.name: list(stream.place) for stream in streams}
        return {**self.collate.batch(contents), "keys": keys, **report, PLACES: (m, places)}

    def _lane(self, m: int) -> list[SourceStream]:
        """The streams of an item's worker, opened at its first item."""
        worker = m % self.workers
        if self._due.get(worker) != m:
            if not self.first <= m < self.first + self.workers:
                raise IndexError(f"item {m} is not the next one of its worker")
            places = self.places[worker] if self.places else {}
            lane, lanes = self.cut.rank + self.cut.world * worker, self.cut.world * self.workers
            make = partial(SourceStream, lane=lane, lanes=lanes, config=self.config, remote=self.remote)
            self._streams[worker] = [make(each, place=places.get(each.name, [0, 0, 0])) for each in self.sources]
        self._due[worker] = m + self.workers
        return self._streams[worker]

    def _item(
        self, streams: list[SourceStream], position: int, counters: dict[str, Counter[str]], bad: list[dict[str, Any]]
    ) -> tuple[str, Any]:
        """(key, content) of the next sample that can be used, of the source that serves the position."""
        which, cursor = self.mixture.at(position)
        source = self.sources[which]
        seed = sample_seed(self.config.seed, 0, cursor, source.name)
        counts = counters[source.name]
        counts["seen"] += 1
        for _ in range(TRIES):
            if (found := self._usable(streams[which], seed, counts, bad)) is not None:
                return found
        raise DataError(
            f"source '{source.name}' gave {TRIES} unusable samples in a row; the last is"
            f" {bad[-1]['key']} ({bad[-1]['reason']}): {bad[-1]['message']}"
        )

    def _usable(
        self, stream: SourceStream, seed: int, counts: Counter[str], bad: list[dict[str, Any]]
    ) -> tuple[str, Any] | None:
        """(key, content) of the next sample, or None if it cannot be used; its shard is not kept open."""
        stored = next(stream)
        try:
            with sample_errors():
                members = stored.read(members_read(stored.members, self.collate))
                found = Sample(stored.key, stream.source.name, {}, [], seed, members, stored.shard.hash)
                sample = decoded(found, self.collate, stream.source.caption)
                prepared = self.collate.prepare(sample)
        except SampleError as error:
            key = f"{stored.shard.place.name}/{stored.key}"
            bad.append({"source": stream.source.name, "key": key, "reason": error.reason, "message": str(error)})
            counts.update(("replaced", f"replaced/{error.reason}"))
            return None
        if kind := record_type(sample.record):
            counts[f"type/{kind}"] += 1
        counts.update(prepared.counters)
        return stored.key, prepared.content


def _remote(sources: Sequence[StreamSource], config: ShardsConfig) -> "RemoteTars | None":
    """What opens copies of remote shards; None without any."""
    if not any(isinstance(shard, Url) for source in sources for shard in source.shards):
        return None
    from mmlab.data.remote.remote_tars import RemoteTars

    return RemoteTars(config.cache)
