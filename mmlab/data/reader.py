"""From a position in the stream to a collated batch: read, decode, prepare, replace what is broken, count."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import Dataset

from mmlab.config.errors import DataError
from mmlab.data.formats import IMAGE_EXTENSIONS, parse_record
from mmlab.data.images import decode_image
from mmlab.data.mixture import Mixture, Sequential, Source
from mmlab.data.order import EpochOrder, replacement, sample_seed, source_seed
from mmlab.data.report import DataReport
from mmlab.data.sample import ImageSpec, Sample, SampleError
from mmlab.runs.ranks import accumulation

TRIES = 10


class Collate(Protocol):
    """What turns samples into the batch that a stage receives.

    Attributes:
        image: how pictures are decoded; None leaves them unread.
        members: extensions of the further members that it reads, beside picture and record.
    """

    image: ImageSpec | None
    members: tuple[str, ...]

    def prepare(self, sample: Sample) -> Any:
        """Tokenise one sample; raises SampleError where it cannot be used (the reader then replaces it)."""
        ...

    def batch(self, prepared: list[Any]) -> dict[str, Any]:
        """Collate what `prepare` returned; may have its own counters in `stats` (source → name → count)."""
        ...


@dataclass(frozen=True)
class GlobalBatches:
    """This rank's micro batches of an endless stream of global batches: item m → its positions."""

    global_batch: int
    micro_batch: int
    world: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        accumulation(self.global_batch, self.micro_batch, self.world)

    def positions(self, m: int) -> range:
        step, part = divmod(m, accumulation(self.global_batch, self.micro_batch, self.world))
        start = step * self.global_batch + (part * self.world + self.rank) * self.micro_batch
        return range(start, start + self.micro_batch)


@dataclass(frozen=True)
class OnePass:
    """This rank's batches of one pass over `samples`: as many on every rank, so that none waits for ever.

    The tail is shared out evenly as a smaller last batch; only what the ranks do not divide is `dropped`. The samples
    lie `every` places apart: more than 1 is a pass over a part of them.
    """

    samples: int
    micro_batch: int
    world: int = 1
    rank: int = 0
    every: int = 1

    def __len__(self) -> int:
        full, tail = divmod(self.samples, self.micro_batch * self.world)
        return full + (tail >= self.world)

    @property
    def dropped(self) -> int:
        return self.samples % self.world

    def positions(self, m: int) -> range:
        start = m * self.micro_batch * self.world
        size = min(self.micro_batch, (self.samples - start) // self.world)
        first = start + self.rank * size
        return range(first * self.every, (first + size) * self.every, self.every)


class LocalBatches(Dataset):
    """Map-style dataset whose item m is this rank's m-th collated batch.

    Items are functions of m: any worker may make any of them, so worker count, fork or spawn change nothing.
    A batch is what the collate returns, with `keys` (list of str), `stats` (source → counter → int: `seen`,
    `replaced`, `replaced/<reason>`, `type/<response type>` and the collate's own) and `bad` (list of {source, key,
    reason, message}).

    Args:
        sources: open sources.
        collate: prepares samples and makes batches of them.
        cut: the positions of each item; `OnePass` reads all samples once in a row, `GlobalBatches` for ever.
        seed: of the order and of all per-sample randomness.
        block_shards: see `EpochOrder`.
        bad_budget: largest share of replaced samples.

    Raises:
        DataError: no usable sample in `TRIES` tries, or far more replacements than the budget allows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        collate: Collate,
        cut: GlobalBatches | OnePass,
        *,
        seed: int = 0,
        block_shards: int = 8,
        bad_budget: float = 0.001,
    ):
        self.sources = list(sources)
        self.collate = collate
        self.cut = cut
        self.seed = seed
        endless = isinstance(cut, GlobalBatches)
        sizes = [len(source) for source in self.sources]
        weights = [source.weight for source in self.sources if source.weight is not None]
        self.stream = Mixture(sizes, weights or None) if endless else Sequential(sizes)
        self.orders = [
            EpochOrder(s.samples_per_shard, source_seed(seed, s.name), block_shards, shuffle=endless)
            for s in self.sources
        ]
        # One worker sees a part of the run: it stops by itself only far over the budget.
        self._guard = DataReport(bad_budget, slack=10)

    def __getitem__(self, m: int) -> dict[str, Any]:
        stats: dict[str, dict[str, int]] = {}
        bad: list[dict[str, Any]] = []
        keys, prepared = [], []
        for position in self.cut.positions(m):
            key, item = self._item(position, stats, bad)
            keys.append(key)
            prepared.append(item)
        self._guard.add({"stats": stats, "bad": bad})
        self._guard.check()
        batch = self.collate.batch(prepared)
        for source, counters in batch.get("stats", {}).items():
            for name, count in counters.items():
                _count(stats, source, name, count)
        return {"keys": keys, **batch, "stats": stats, "bad": bad + batch.get("bad", [])}

    def _item(self, position: int, stats: dict[str, dict[str, int]], bad: list[dict[str, Any]]) -> tuple[str, Any]:
        """The prepared sample at `position`, or its stand-in; what comes after does not shift."""
        which, cursor = self.stream.at(position)
        source = self.sources[which]
        size = len(source)
        epoch, place = divmod(cursor, size)
        seed = sample_seed(self.seed, epoch, place, source.name)
        tried: list[int] = []
        i = self.orders[which].sample(epoch, place)
        _count(stats, source.name, "seen", 1)
        while len(tried) < min(TRIES, size):
            number = source.number(i)
            key = str(source.index.keys[number])
            try:
                prepared = self.collate.prepare(self._read(source, number, key, seed))
                if kind := source.index.type_of(number):
                    _count(stats, source.name, f"type/{kind}", 1)
                return key, prepared
            except SampleError as error:
                bad.append({"source": source.name, "key": key, "reason": error.reason, "message": str(error)})
                _count(stats, source.name, "replaced", 1)
                _count(stats, source.name, f"replaced/{error.reason}", 1)
            tried.append(i)
            i = replacement(self.seed, epoch, place, source.name, len(tried), size)
            while i in tried and len(tried) < size:
                i = (i + 1) % size
        raise DataError(
            f"source '{source.name}' gave {len(tried)} unusable samples in a row; the last is"
            f" {bad[-1]['key']} ({bad[-1]['reason']}): {bad[-1]['message']}"
        )

    def _read(self, source: Source, i: int, key: str, seed: int) -> Sample:
        spec = self.collate.image
        pictures = () if spec is None else IMAGE_EXTENSIONS
        members = source.index.read(i, (*pictures, "json", "txt", *self.collate.members))
        try:
            record = parse_record(members)
        except (ValueError, RecursionError) as error:
            raise SampleError("json", f"its record does not parse: {error}") from error
        picture = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        image = None if picture is None or spec is None else decode_image(picture, spec)
        further = {name: members[name] for name in self.collate.members if name in members}
        return Sample(key, source.name, record, image, seed, further, source.index.hash)


def _count(stats: dict[str, dict[str, int]], source: str, name: str, count: int) -> None:
    counters = stats.setdefault(source, {})
    counters[name] = counters.get(name, 0) + count
