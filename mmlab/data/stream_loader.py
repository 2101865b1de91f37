"""The loader of shards without an index, and the places of its streams, from which a run resumes."""

import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from mmlab.data.batch_loader import LocalLoader
from mmlab.data.config import ShardsConfig, StreamLoaderConfig
from mmlab.data.reader import Collate, GlobalBatches
from mmlab.data.stream import PLACES, Place, StreamBatches, StreamSource, open_streams
from mmlab.runs.ranks import rank

LANE = dict[str, Place]
"""Source → place, in one worker."""
_AHEAD = 8
"""Batches that Lightning may have fetched and not trained."""


class StreamLoader:
    """Feeds training with shards that have no index.

    With the same ranks and workers, a resumed run has the batches of an uninterrupted one, bit for bit. With others,
    every source starts a new pass.

    Args:
        config: settings.
    """

    def __init__(self, config: StreamLoaderConfig):
        self.config = config
        self._sources: list[StreamSource] | None = None
        self._begin: list[LANE] = []  # of this rank's workers when the loader starts; empty: nothing was read yet
        self._after: dict[int, deque[tuple[int, LANE]]] = {}  # worker → its last micro-batches, and the places after

    def sources(self, data: ShardsConfig) -> list[StreamSource]:
        """The open training sources; raises what `open_streams` raises."""
        if self._sources is None:
            self._sources = open_streams(data)
        return self._sources

    def load(
        self, data: ShardsConfig, collate: Collate, cut: GlobalBatches, stop: int, start: Callable[[], int], pin: bool
    ) -> LocalLoader:
        """The batches `start() … stop - 1` of this rank, from the restored places; arguments as of `LocalLoader`."""
        dataset = StreamBatches(self.sources(data), collate, cut, data)
        room = data.global_batch // (cut.micro_batch * cut.world) + _AHEAD

        def begin() -> int:
            first = start()
            dataset.start(first, self._begin)
            self._after = defaultdict(lambda: deque(maxlen=room))
            return first

        def record(m: int, lane: LANE) -> None:
            self._after[m % dataset.workers].append((m, lane))

        return _Recorded(dataset, stop, begin, data.workers, record, pin)

    def spread(self, data: ShardsConfig, collate: Collate, cut: GlobalBatches, count: int) -> LocalLoader:
        """About `count` samples from the start of the streams, over all ranks."""
        batches = max(1, round(count / (cut.micro_batch * cut.world)))
        dataset = StreamBatches(self.sources(data), collate, cut, data)
        return _Recorded(dataset, batches, lambda: 0, data.workers, lambda m, lane: None, False)

    def reset(self) -> None:
        """Forget restored places."""
        self._begin, self._after = [], {}

    def state_dict(self, trained: int, data: ShardsConfig) -> dict[str, Any]:
        """The places after `trained` micro-batches of each rank; a collective call where there are several."""
        workers = max(1, data.workers)
        names = [source.name for source in self.sources(data)]
        mine = []
        for worker in range(workers):
            lane = self._begin[worker] if self._begin else {name: [0, 0, 0] for name in names}
            before = [places for m, places in self._after.get(worker, ()) if m < trained]
            mine.append(before[-1] if before else lane)
        if not (dist.is_available() and dist.is_initialized()):
            return {"workers": workers, "places": [mine]}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return {"workers": workers, "places": everyone}

    def load_state_dict(self, state: dict[str, Any], data: ShardsConfig, world: int, this: int) -> None:
        """Continue from the places of a checkpoint.

        Args:
            state: what `state_dict` returned.
            data: settings of the data.
            world: number of ranks.
            this: number of this rank.
        """
        places: Sequence[Sequence[LANE]] = state["places"]
        workers = max(1, data.workers)
        if (len(places), state["workers"]) == (world, workers):
            self._begin = [dict(lane) for lane in places[this]]
            return
        if this == 0:
            then, now = _ranks(len(places), state["workers"]), _ranks(world, workers)
            print(
                f"WARNING: the checkpoint was made by {then}, and this run has {now}: without an index every source "
                "starts a new pass, in which samples of the present one may occur again.",
                file=sys.stderr,
                flush=True,
            )
        lanes = [lane for rank_places in places for lane in rank_places]
        latest = {name: max(lane[name][0] for lane in lanes) for name in lanes[0]}
        self._begin = [{name: [turn + 1, 0, 0] for name, turn in latest.items()} for _ in range(workers)]


class _Recorded(LocalLoader):
    """Takes the places out of the batches, and records them."""

    def __init__(self, dataset: StreamBatches, stop, start, workers, record: Callable[[int, LANE], None], pin: bool):
        super().__init__(dataset, stop, start, workers, pin_memory=pin)
        self._record = record

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._record(*batch.pop(PLACES))
            yield batch


def say_promises(config: StreamLoaderConfig) -> None:
    """Print, on the first rank, what is promised for shards with an index and not here."""
    if rank() > 0:
        return
    again = (
        "shards are drawn at random, so a pass neither ends nor shows each sample once"
        if config.resampled
        else "a worker that is through its shards begins the next pass before the others"
    )
    print(
        "data/loader=stream: the order of samples depends on the numbers of ranks and workers, a resume with other "
        f"numbers starts a new pass, and {again}. Shards are not compared with checksums, nor their keys with each "
        "other; `mmlab shards index` and data/loader=indexed do all of this.",
        flush=True,
    )


def _ranks(world: int, workers: int) -> str:
    return f"{world} rank{'s' * (world > 1)} x {workers} worker{'s' * (workers > 1)}"
