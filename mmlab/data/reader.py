"""From a position in the stream to a collated batch: read, decode, prepare, replace bad samples, count."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from torch.utils.data import Dataset, get_worker_info

from mmlab.config.errors import DataError
from mmlab.config.locations import Url
from mmlab.data.bad_samples import sample_errors
from mmlab.data.bucket_mixture import BucketMixture
from mmlab.data.config import FLOOR, ShardsConfig
from mmlab.data.counters import DataReport
from mmlab.data.formats import parse_record
from mmlab.data.images import decode_picture, pictures_read
from mmlab.data.mixture import Mixture, Sequential, Source
from mmlab.data.order import EpochOrder, replacement, sample_seed, source_seed
from mmlab.data.sample_types import ImageSpec, Prepared, Sample, SampleError
from mmlab.runs.ranks import accumulation

TRIES = 10


class Collate(Protocol):
    """What turns samples into the batch that a stage receives.

    Attributes:
        image: how images are decoded; None leaves them unread.
        members: extensions of the members that it reads beside image and record.
    """

    image: ImageSpec | None
    members: tuple[str, ...]

    def prepare(self, sample: Sample) -> Prepared:
        """Tokenize one sample; raises SampleError if it cannot be used (the reader then replaces it).

        Another exception also counts as the sample's fault; only a UserError, OSError or MemoryError ends the run.
        """
        ...

    def batch(self, contents: list[Any]) -> dict[str, Any]:
        """Collate the contents of prepared samples."""
        ...


@dataclass(frozen=True)
class GlobalBatches:
    """This rank's micro-batches of an endless stream of global batches: item m → its positions."""

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
    """This rank's batches of one pass over `samples`: equally many on every rank, so that none waits forever.

    The remainder is divided evenly into a smaller last batch; only what does not divide by the ranks is `dropped`. The
    samples are `every` places apart: more than 1 reads a part of them.
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


@dataclass(frozen=True)
class BucketPass:
    """This rank's batches of one pass over samples that lie bucket after bucket: a `OnePass` over each bucket.

    What does not divide by the ranks is dropped in each bucket.
    """

    sizes: tuple[int, ...]
    micro_batch: int
    world: int = 1
    rank: int = 0
    every: int = 1

    def __len__(self) -> int:
        return sum(map(len, self._passes))

    @property
    def samples(self) -> int:
        return sum(each.samples for each in self._passes)

    @property
    def dropped(self) -> int:
        return sum(each.dropped for each in self._passes)

    def positions(self, m: int) -> range:
        start = 0
        for size, each in zip(self.sizes, self._passes, strict=True):
            if m < len(each):
                own = each.positions(m)
                return range(start + own.start, start + own.stop, own.step)
            m -= len(each)
            start += size
        raise IndexError("a pass has fewer batches")

    @cached_property
    def _passes(self) -> list[OnePass]:
        # At least one of each bucket: a pass over few samples has all shapes.
        counts = (max(1, size // self.every) for size in self.sizes)
        return [OnePass(count, self.micro_batch, self.world, self.rank, self.every) for count in counts]


class LocalBatches(Dataset):
    """Map-style dataset whose item m is this rank's m-th collated batch.

    Items are functions of m: any worker may make any of them, so the number of workers, fork or spawn change nothing.
    A batch is what the collate returns, with `keys` (list of str), `stats` (source → counter → int: `seen`,
    `replaced`, `replaced/<reason>`, `type/<response type>`, those of `Bucket.counters` and the collate's own), `bad`
    (list of {source, key, reason, message}) and, with remote sources, `waited` (seconds that reading it has waited for
    shards to arrive).

    Args:
        sources: open sources; or the parts of `by_bucket`, and then each batch is of one bucket.
        collate: prepares samples and makes batches of them.
        cut: the positions of each item; `OnePass` reads each sample once, in order, as does `BucketPass` of parts by
            bucket; `GlobalBatches` never ends.
        config: settings of the order and of the budget.

    Raises:
        DataError: no usable sample in `TRIES` tries, or far more replacements than the budget allows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        collate: Collate,
        cut: GlobalBatches | OnePass | BucketPass,
        config: ShardsConfig,
    ):
        self.sources = list(sources)
        self.collate = collate
        self.cut = cut
        self.seed = config.seed
        endless = isinstance(cut, GlobalBatches)
        self.stream = _stream(self.sources, cut)
        self.orders = [
            EpochOrder(s.samples_per_shard, source_seed(self.seed, s.name), config.block_shards, shuffle=endless)
            for s in self.sources
        ]
        self._upcoming = None
        remote = any(isinstance(source.index.root, Url) for source in self.sources)
        if remote and (endless or cut.every == 1):  # a few samples of each shard are read in ranges
            from mmlab.data.upcoming import Upcoming

            self._upcoming = Upcoming(self.sources, self.orders, self.stream, config)
        # A worker sees only a part of the run, so it stops only far over the budget.
        self._guard = DataReport(config.bad_budget, FLOOR, slack=10)

    def __getitem__(self, m: int) -> dict[str, Any]:
        counters: dict[str, Counter[str]] = defaultdict(Counter)
        bad: list[dict[str, Any]] = []
        keys, contents = [], []
        if self._upcoming is not None:
            self._upcoming.begin(self.cut.positions(m)[0])
        for position in self.cut.positions(m):
            key, content = self._item(position, counters, bad)
            keys.append(key)
            contents.append(content)
        report: dict[str, Any] = {"stats": {source: dict(counts) for source, counts in counters.items()}, "bad": bad}
        self._guard.add(report)
        self._guard.check()
        if self._upcoming is not None:
            report["waited"] = self._upcoming.end(self._next(m))
        return {**self.collate.batch(contents), "keys": keys, **report}

    def _next(self, m: int) -> int | None:
        """The first position of the item that this process makes after item m, None if there is none."""
        worker = get_worker_info()
        m += worker.num_workers if worker is not None else 1
        return self.cut.positions(m)[0] if isinstance(self.cut, GlobalBatches) or m < len(self.cut) else None

    def _item(self, position: int, counters: dict[str, Counter[str]], bad: list[dict[str, Any]]) -> tuple[str, Any]:
        """(key, content) of the sample at `position`, or of its replacement; later positions do not shift."""
        which, cursor = self.stream.at(position)
        source = self.sources[which]
        size = len(source)
        epoch, place = divmod(cursor, size)
        if self._upcoming is not None:
            self._upcoming.enter(which, epoch, place)
        seed = sample_seed(self.seed, epoch, place, source.stream)
        tried: list[int] = []
        i = self.orders[which].sample(epoch, place)
        counts = counters[source.name]
        counts["seen"] += 1
        while len(tried) < min(TRIES, size):
            number = source.number(i)
            key = str(source.index.keys[number])
            try:
                with sample_errors():
                    prepared = self.collate.prepare(self._read(source, number, key, seed))
                if kind := source.index.type_of(number):
                    counts[f"type/{kind}"] += 1
                if source.bucket is not None:
                    counts.update(source.bucket.counters(number))
                counts.update(prepared.counters)
                return key, prepared.content
            except SampleError as error:
                bad.append({"source": source.name, "key": key, "reason": error.reason, "message": str(error)})
                counts.update(("replaced", f"replaced/{error.reason}"))
            tried.append(i)
            i = replacement(self.seed, epoch, place, source.stream, len(tried), size)
            while i in tried and len(tried) < size:
                i = (i + 1) % size
        raise DataError(
            f"source '{source.name}' gave {len(tried)} unusable samples in a row; the last is"
            f" {bad[-1]['key']} ({bad[-1]['reason']}): {bad[-1]['message']}"
        )

    def _read(self, source: Source, i: int, key: str, seed: int) -> Sample:
        names = members_read(source.index.extensions(i), self.collate)
        members = source.index.read(i, names)
        stored = Sample(key, source.name, {}, [], seed, members, source.index.hash)
        if source.bucket is None or self.collate.image is None:
            return decoded(stored, self.collate, source.caption)
        spec = replace(self.collate.image, buckets=(source.bucket.shape,))
        return decoded(stored, self.collate, source.caption, spec)


def _stream(
    sources: Sequence[Source], cut: GlobalBatches | OnePass | BucketPass
) -> Mixture | BucketMixture | Sequential:
    """Which source serves each position."""
    sizes = [len(source) for source in sources]
    if not isinstance(cut, GlobalBatches):
        return Sequential(sizes)
    if any(source.bucket is not None for source in sources):
        return BucketMixture(sources, cut.global_batch)
    weights = [source.weight for source in sources if source.weight is not None]
    return Mixture(sizes, weights or None)


def members_read(extensions: Iterable[str], collate: Collate) -> tuple[str, ...]:
    """The members that are read of a sample which has `extensions`; it may lack some of them."""
    return (*pictures_read(extensions, collate.image), "json", "txt", *collate.members)


def decoded(stored: Sample, collate: Collate, caption: str | None = None, image: ImageSpec | None = None) -> Sample:
    """A sample with its record and pictures, made of its members; those that the collate reads itself remain.

    Args:
        stored: with all members that are read.
        collate: names them.
        caption: in place of the record's own; None keeps these.
        image: how images are decoded, in place of the collate's.

    Raises:
        SampleError: see `parse_record` and `decode_picture`.
    """
    spec, members = image or collate.image, stored.members
    record = parse_record(members)
    if caption is not None:
        record = {**record, "caption": caption, "captions": []}
    names = pictures_read(members, spec)
    pictures = [decode_picture(members[name], spec) for name in names] if spec is not None else []
    further = {name: members[name] for name in collate.members if name in members}
    return replace(stored, record=record, pictures=pictures, members=further)
