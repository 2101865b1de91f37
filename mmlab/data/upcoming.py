"""Which shards of remote sets a loader reads now, and which ones after that: what the shard cache holds and fetches."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.errors import ConfigError
from mmlab.config.locations import Url
from mmlab.data.bucket_mixture import BucketMixture, by_bucket
from mmlab.data.config import ShardsConfig
from mmlab.data.mixture import Mixture, Sequential, Source, by_type, open_sources
from mmlab.data.order import EpochOrder
from mmlab.data.remote.remote_files import Reader, RemoteFiles, Shards, in_turn, reader_of
from mmlab.data.remote.remote_tars import RemoteTars
from mmlab.runs.ranks import accumulation, world_size
from mmlab.runs.shard_patterns import lacks_index, named_shards

Block = tuple[int, int, int]
"""Source, epoch, and number of the block."""


class Upcoming:
    """Tells the shard cache what is wanted, from the position of one loader in one process.

    Of a mixture, each source has a present block; samples of sources in sequence are of one block at a time. The next
    blocks follow, and shards of later ones.

    Args:
        sources: of the loader, local ones too.
        orders: of their samples.
        stream: which source serves each position.
        config: settings of the data.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        orders: Sequence[EpochOrder],
        stream: Mixture | BucketMixture | Sequential,
        config: ShardsConfig,
    ):
        self.sources, self.orders, self.stream, self.config = sources, orders, stream, config
        self._remote = [source.fetched for source in sources]
        self._blocks: list[Block] = []
        self._told: tuple[int, list[Block], list[Block]] | None = None  # process, present blocks, first of the next
        self._waited = 0.0

    @property
    def reader(self) -> Reader:
        return reader_of(self.config.cache)

    def begin(self, position: int) -> None:
        """An item whose first sample is at `position` is made now."""
        self._waited = self.reader.waited
        self.reader.client.renew()
        self._blocks = self._blocks_at(position)
        self._tell(self._blocks, [])

    def enter(self, which: int, epoch: int, place: int) -> None:
        """A sample of a source is read now."""
        if not self._remote[which] or (block := (which, *self.orders[which].block(epoch, place))) in self._blocks:
            return
        others = [] if isinstance(self.stream, Sequential) else [each for each in self._blocks if each[0] != which]
        self._blocks = sorted([*others, block])
        self._tell(self._blocks, [])

    def end(self, position: int | None) -> float:
        """The item is made; the next one of this process begins at `position`, or there is none.

        If that is in another block, nothing more of the present one is read here: other processes may need its place.

        Returns:
            Seconds that reading the item has waited for the fetcher.
        """
        coming = self._blocks_at(position or 0)
        present = [block for block in self._blocks if position is not None and block in coming]
        self._tell(present, [block for block in coming if block not in present])
        self._close_tables(present)
        return self.reader.waited - self._waited

    def _blocks_at(self, position: int) -> list[Block]:
        """The blocks of the next sample of each source, or of the next sample of all."""
        if isinstance(self.stream, Sequential):
            cursors = [self.stream.at(position)]
        else:
            cursors = list(enumerate(self.stream.served(position)))
        places = ((which, *divmod(cursor, len(self.sources[which]))) for which, cursor in cursors)
        return [(which, *self.orders[which].block(*place)) for which, *place in places if self._remote[which]]

    def _tell(self, present: list[Block], following: list[Block]) -> None:
        """Want the shards of the present blocks, then those of the following blocks, or of what follows the present."""
        if self._told == (os.getpid(), present, following):
            return
        self._close_tables(present)
        later = [self._from(block) for block in [*present, *following]]
        now = [next(blocks) for blocks in later[: len(present)]]
        then = [next(blocks) for blocks in later]
        count = self.config.cache.ahead
        ahead = in_turn(list(islice(chain.from_iterable(blocks), count)) for blocks in later)
        self.reader.want(self, in_turn(now), in_turn(then), ahead[:count])
        self._told = os.getpid(), present, following

    def _from(self, block: Block) -> Iterator[Shards]:
        """The shards of a block, and of those that follow it, without end."""
        which, epoch, first = block
        while True:
            if self._remote[which]:
                for numbers in self.orders[which].blocks(epoch, first):
                    if numbers:
                        yield self._shards(which, numbers)
            first = 0
            if isinstance(self.stream, Sequential):
                which = (which + 1) % len(self.sources)
            else:
                epoch += 1

    def _shards(self, which: int, numbers: Sequence[int]) -> Shards:
        source = self.sources[which]
        files, entries = source.index.files, source.index.manifest.entries
        assert isinstance(files, RemoteFiles)
        return [(files, entries[source.shards[number]]) for number in numbers]

    def _close_tables(self, present: list[Block]) -> None:
        """Close the tables of shards that are not of the present blocks: their copies may be evicted."""
        remote = [source for source in self.sources if isinstance(source.index.root, Url)]
        kept: dict[int, set[int]] = {id(source.index): set() for source in remote}
        for which, epoch, first in present:
            source = self.sources[which]
            numbers = next(self.orders[which].blocks(epoch, first))
            kept[id(source.index)].update(int(source.shards[number]) for number in numbers)
        for source in remote:
            if isinstance(source.index.files, RemoteFiles) and source.index.files.tables is None:
                source.index.keep_tables(kept[id(source.index)])


def check_addresses(cfg: DictConfig) -> None:
    """Open all sources of a `TrainConfig` that are addresses, so that a run does not find out late what it cannot read.

    Raises:
        DataError: an index cannot be read.
        ConfigError: the shard cache has too little room for the shards that are read at the same time.
    """
    config: Any = OmegaConf.to_object(cfg.data)
    if not isinstance(config, ShardsConfig):  # a user's own data
        return
    train = [] if config.streamed else [source for source in config.train if isinstance(config.folder(source), Url)]
    val = [source for source in config.val if isinstance(config.folder(source), Url)]
    if config.streamed:
        val = [source for source in val if not lacks_index(source.path, config.root)]
    for source in config.train if config.streamed else []:
        RemoteTars(config.cache).check(named_shards(source.path, config.root))
    if train or val:
        sources = open_sources(config, train)
        parts = by_type(sources) if config.balance == "type" else sources
        listed = parts, open_sources(config, val)
        if config.shapes:
            listed = (by_bucket(listed[0], config.shapes), by_bucket(listed[1], config.shapes))
        check_room(config, *listed, world_size(cfg.trainer))


def check_room(config: ShardsConfig, train: Sequence[Source], val: Sequence[Source], world: int) -> None:
    """Raise ConfigError if the shard cache is smaller than what the processes of a run may read at the same time.

    They are in two blocks of a source, or in more if these have few samples: workers make batches that are needed up to
    three rounds later, and ranks are up to a step apart.

    Args:
        config: settings of the data.
        train, val: remote sources.
        world: number of ranks.
    """
    apart = 3 * config.workers + accumulation(config.global_batch, config.micro_batch, world) + 1
    samples = apart * world * config.micro_batch
    weights = [len(source) if source.weight is None else source.weight for source in train]
    blocks = []
    for source, weight in zip(train, weights, strict=True):
        if source.bucket is None:
            blocks.append(_most_bytes(source, 2 * config.block_shards, samples * weight / sum(weights)))
        elif not source.bucket.sparse:  # of which all samples of a batch may be
            blocks.append(_most_bytes(source, 2 * config.block_shards, samples))
    blocks.append(max((_most_bytes(source, 2, samples) for source in val), default=0))
    sets = {source.index.root: _most_bytes(source, len(source.index.shards), 0) for source in train}
    needed = min(sum(blocks), sum(sets.values()) + blocks[-1])
    if needed > config.cache.bytes:
        raise ConfigError(
            f"the remote shards that are read at the same time take up to {needed / 1e9:,.3g} GB, but the shard cache "
            f"holds {config.cache.bytes / 1e9:,.3g} GB; raise data.cache.gigabytes, or lower data.block_shards."
        )


def _most_bytes(source: Source, shards: int, samples: float) -> int:
    """The bytes of the largest shards of a source with their tables: of so many, and of those that hold the samples."""
    entries = [source.index.manifest.entries[shard] for shard in source.shards]
    more = int(samples * len(entries) / len(source))
    return sum(sorted((entry.bytes + entry.table_bytes for entry in entries), reverse=True)[: shards + more])
