"""Copies of remote shards that have no index, for the streams of one process."""

from collections.abc import Hashable, Sequence
from pathlib import Path

from mmlab.config.locations import Location, Url
from mmlab.data.config import CacheConfig
from mmlab.data.remote.remote_files import open_copy, reader_of
from mmlab.data.remote.wanted import Wanted
from mmlab.data.tar_samples import OpenTar


class RemoteTars:
    """Opens copies of remote tars in the shard cache, as whole files.

    Args:
        cache: settings of the shard cache.
    """

    def __init__(self, cache: CacheConfig):
        self.cache = cache
        self._wanted: dict[str, Wanted] = {}

    def want(self, stream: Hashable, present: Sequence[Location], next: Sequence[Location]) -> None:
        """Replace what one stream reads now, and what it reads after that; its earlier shards must be closed.

        Raises:
            DataError: a shard that is not there, or the cache cannot hold those that are read now.
        """
        lists = [
            [(self, self._object(shard)) for shard in shards if isinstance(shard, Url)] for shards in (present, next)
        ]
        reader_of(self.cache).want(stream, *lists)  # type: ignore[arg-type]

    @property
    def waited(self) -> float:
        """Seconds that this process has waited for the fetcher."""
        return reader_of(self.cache).waited

    def renew(self) -> None:
        """Tell a new fetcher what the streams want, if the one before has ended."""
        reader_of(self.cache).client.renew()

    def check(self, shards: Sequence[Location]) -> None:
        """Raise DataError if the first or the last one of some shards is at an address where there is none."""
        for shard in {str(shard): shard for shard in (shards[0], shards[-1])}.values():
            if isinstance(shard, Url):
                self._object(shard)

    def object(self, entry: Wanted) -> Wanted:
        """What the fetcher is asked for, as `RemoteFiles.object` returns it."""
        return entry

    def open(self, shard: Url) -> OpenTar:
        """Open the copy of a shard when it is there; raises DataError if it cannot be fetched."""

        def fetch() -> Path:
            with reader_of(self.cache).waiting() as client:
                return client.file(self._object(shard))

        return open_copy(fetch, lambda path: OpenTar(shard, path), shard)

    def _object(self, shard: Url) -> Wanted:
        if str(shard) not in self._wanted:
            with reader_of(self.cache).waiting() as client:
                size, etag = client.stat(str(shard.parent), shard.name)
            self._wanted[str(shard)] = Wanted(str(shard.parent), shard.name, size, etag)
        return self._wanted[str(shard)]
