"""How fast remote shards arrive: numbers for the logs of a run."""

from collections.abc import Mapping
from typing import Any

from mmlab.data.config import CacheConfig
from mmlab.data.remote.remote_files import reader_of


class FetchMetrics:
    """Measures, from its construction on, what the readers of a run and the fetcher of this machine do.

    Args:
        cache: settings of the shard cache.
        step: optimizer steps so far.
    """

    def __init__(self, cache: CacheConfig, step: int = 0):
        self._cache = cache
        self._step = step  # of the last values
        self._waited = 0.0
        self._first = self._last = self._stats()

    def add(self, batch: Mapping[str, Any]) -> None:
        """Count a batch."""
        self._waited += batch.get("waited", 0.0)

    def values(self, step: int) -> dict[str, float]:
        """What was measured, at the end of an optimizer step.

        Returns:
            `data/wait`: seconds that reading the samples of one step of this rank waited for shards, in whatever
            process, on average since the last values. `data/fetch_mb_s`: MB/s of all downloads of the machine together
            while there were any, since the last values; 0 if there were none. `data/cache_hit`: share of the files that
            were on disk when they were first asked for, since the start; 1 if none was asked for.
        """
        now, before, first = self._stats(), self._last, self._first
        if now["process"] != before["process"]:  # another fetcher counts from 0
            before = first = self._first = dict.fromkeys(now, 0)
        steps = max(step - self._step, 1)
        seconds = now["seconds"] - before["seconds"]
        hits, misses = (now[name] - first[name] for name in ("hits", "misses"))
        wait, self._waited, self._step, self._last = self._waited / steps, 0.0, step, now
        return {
            "data/wait": wait,
            "data/fetch_mb_s": (now["bytes"] - before["bytes"]) / 1e6 / seconds if seconds else 0.0,
            "data/cache_hit": hits / (hits + misses) if hits + misses else 1.0,
        }

    def _stats(self) -> dict[str, Any]:
        return reader_of(self._cache).client.stats()
