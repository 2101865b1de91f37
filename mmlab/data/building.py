"""Foreign data sets become shards: in parallel, in splits, and from where a killed build stopped."""

import hashlib
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError
from mmlab.config.locations import Location, Url, location
from mmlab.data.formats import Members
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index
from mmlab.data.progress_bar import progress
from mmlab.data.shard_draft import ShardDraft
from mmlab.data.shard_files import NumberedTars, check_destination, put_in_place
from mmlab.data.splits import REST, digests_of, most_connected, representatives, split_of
from mmlab.data.tally import Tally
from mmlab.runs.disk import claim, writing
from mmlab.runs.index_files import upload_draft

Entry = tuple[str, Any]
"""Where a row is, and what it holds."""
Convert = Callable[[str, Any, Tally], tuple[str, Members] | None]
"""Makes (name, members) of one entry, or None, and counts its rows in the tally. It is called in any thread."""


@dataclass
class Rows:
    """A foreign data set.

    Attributes:
        entries: all rows, in order; reading them is cheap.
        convert: what makes a sample of one of them.
        tally: counts rows that `entries` leaves out, and names the details in the order in which they are printed.
        missing_budget: share of the rows whose image may be missing or unsupported.
        count: number of rows that name an image; None: each does.
        streamed: files whose entries are not listed before the first one is converted, because they hold images; each
            with what changes when it is written again, see `versions_of`.
        group: joins entries that make one sample.
        finish: is called with all counts before the shards get their names; may refuse them.
    """

    entries: Iterable[Entry]
    convert: Convert
    tally: Tally
    missing_budget: float = 0.0
    count: int | None = None
    streamed: Sequence[str] = ()
    group: Callable[[Iterable[Entry]], Iterable[Entry]] = lambda entries: entries
    finish: Callable[[Tally], None] = lambda tally: None


@dataclass(frozen=True)
class Build:
    """How shards are written.

    Attributes:
        max_samples: samples per shard.
        overwrite: replace earlier shards.
        splits: name → share of the pictures that belong to it instead of to `train`.
        seed: of the splits.
        limit: read only so many rows.
        workers: threads that read and check images.
        identity: what decides the samples: a killed build is continued by one with the same; None: by none.
    """

    max_samples: int = 1000
    overwrite: bool = False
    splits: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    limit: int | None = None
    workers: int = 1
    identity: str | None = None

    def __post_init__(self) -> None:
        if self.max_samples < 1:
            raise ConfigError(f"a shard holds at least one sample, not {self.max_samples}.")
        if REST in self.splits:
            raise ConfigError(f"the split '{REST}' is what the others leave; give it no share.")
        if self.splits and not sum(self.splits.values()) < 1:
            raise ConfigError(f"the shares of the splits leave nothing to '{REST}'; their sum must be below 1.")

    def folders(self, root: Location) -> dict[str, Location]:
        """Name of each split → its folder; without splits `root` itself."""
        return {name: root / name for name in (REST, *self.splits)} if self.splits else {REST: root}

    def split_of(self, digest: str) -> str:
        """The split of a sample with that picture, see `mmlab.data.splits.split_of`."""
        return split_of(digest, self.splits, self.seed)


def write_rows(
    rows: Rows, root: str | Location, build: Build | None = None, quiet: bool = False
) -> tuple[dict[str, ShardIndex], Tally]:
    """Write a data set as shards, in a folder beside `root` that gets its name when all of it is there.

    A killed build leaves that folder, and one with the same `identity` continues in it; the result is the same. For an
    address, the folder is in the user's cache; it takes as much space as the set, until all of it is uploaded.

    Args:
        rows: the data set.
        root: the folder or the address to make; with splits, each has a subfolder.
        build: how.
        quiet: show no progress.

    Returns:
        The index of each split, and the counts of all rows.

    Raises:
        ConfigError: a destination that is not empty.
        DataError: what the data set raises, no row that can be used, more lost images than the budget allows, or a
            split without a sample.
        RunError: another process builds there, or the disk refuses.
    """
    build = build or Build()
    place = location(root).resolve()
    for folder in [place] if isinstance(place, Path) and not place.is_dir() else build.folders(place).values():
        check_destination(folder, build.overwrite)
    local = upload_draft(place) if isinstance(place, Url) else place
    draft = local.with_name(f"{local.name}.building")
    with writing(local), closing(claim(draft / "lock", "is writing shards in")):
        try:
            entries = _limited(rows, build.limit)
            entries = entries if rows.streamed else list(entries)
            identity = build.identity and f"{build.identity} {_inputs(rows, entries)}"
            work = ShardDraft(draft, build.folders(draft), build.max_samples, identity)
            tally = _convert(rows, entries, work, build, quiet)
            rows.finish(tally)
            finished = _finish(work, place, tally, build, quiet)
        except OSError:  # such as a full disk, after which the build can continue
            raise
        except Exception:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        # An upload that fails keeps the draft, and the same build continues it.
        splits = build.folders(place)
        indexes = put_in_place([(finished[name], folder) for name, folder in splits.items()], quiet)
        shutil.rmtree(draft, ignore_errors=True)
    return dict(zip(splits, indexes, strict=True)), tally


def _convert(rows: Rows, entries: Iterable[Entry], draft: ShardDraft, build: Build, quiet: bool) -> Tally:
    """Convert all rows; return their counts."""
    limit = build.limit
    count = total = rows.count if limit is None or rows.count is None else min(limit, rows.count)
    if not rows.streamed:
        listed = list(entries)
        count = len(listed) if rows.count is None else count
        entries = list(rows.group(listed))
        total = len(entries)
    if draft.converted and not quiet:
        print(f"continuing a build that was stopped after {draft.converted} entries", file=sys.stderr)
    allowed = None if count is None else int(rows.missing_budget * count)
    made = _converted(islice(entries, draft.converted, None), rows.convert, build.workers)
    skipped = range(draft.converted)  # counted by the progress bar
    for one in progress(chain(skipped, made), "writing samples", total, quiet):
        if isinstance(one, int):
            continue
        sample, counts = one
        draft.tally.add(counts)
        if allowed is not None and len(draft.tally.lost) > allowed and counts.lost:
            number = len(draft.tally.lost)
            text = f"missing or unsupported: {number}, the missing budget allows {allowed}"
            raise DataError(f"{draft.tally.lost[allowed].rstrip('.')} ({text}).")
        if sample is not None:
            digests = digests_of(sample[1]) if build.splits else []
            draft.write(*sample, build.split_of(min(digests)) if digests else REST, digests)
        draft.converted += 1
    draft.close()
    tally = Tally()
    for part in (rows.tally, draft.tally):
        tally.add(part)
    if draft.keys.repeats:
        tally.details["renamed"] += draft.keys.repeats
    return tally


def _limited(rows: Rows, limit: int | None) -> Iterator[Entry]:
    """The entries of at most `limit` rows, those that are left out included."""
    for number, entry in enumerate(rows.entries):
        if limit is not None and number + rows.tally.rows >= limit:
            return
        yield entry


def _inputs(rows: Rows, entries: Iterable[Entry]) -> str:
    """What changes when there are other rows, or other contents of the files that hold them."""
    digest = hashlib.sha256()
    for name in rows.streamed or (where for where, _ in entries):
        digest.update(name.encode("utf-8", "replace") + b"\0")
    return digest.hexdigest()


def versions_of(paths: Iterable[Path]) -> list[str]:
    """The names of files, each with its size and time."""
    stats = ((path, path.stat()) for path in paths)
    return [f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats]


def _converted(
    entries: Iterable[Entry], convert: Convert, workers: int
) -> Iterator[tuple[tuple[str, Members] | None, Tally]]:
    """(sample, counts) of each entry in order; threads work ahead, as images are decoded outside of Python's lock."""

    def one(entry: Entry) -> tuple[tuple[str, Members] | None, Tally]:
        tally = Tally()
        return convert(*entry, tally), tally

    if workers <= 1:
        yield from map(one, entries)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            for entry in entries:
                waiting.append(pool.submit(one, entry))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _finish(draft: ShardDraft, root: Location, tally: Tally, build: Build, quiet: bool) -> dict[str, Path]:
    """Index all splits; returns the folder of each."""
    if tally.rows and not tally.written:
        raise DataError(f"none of {tally.rows} rows can be used: {'; '.join(tally.lines())}")
    places = {name: (draft.folder / name, tars.count) for name, tars in draft.tars.items()}
    digests = draft.digests() if draft.several else []
    if digests:
        places |= _rejoined(draft, digests, build, quiet)
    counts = {name: count for name, (_, count) in places.items()}
    if not sum(counts.values()):
        raise DataError(f"there are no samples to write to {root}.")
    for name, count in counts.items():
        if not count:
            share = build.splits.get(name)
            said = name if share is None else f"{name}={share:g}"
            raise DataError(
                f"the split {said} gets none of {sum(counts.values())} samples, {_drawn(digests)}; give "
                f"{'the others smaller shares' if share is None else 'it a larger share'}, or another --seed."
            )
    for name in counts:
        build_index(places[name][0], quiet=quiet, elsewhere=False)
    return {name: folder for name, (folder, _) in places.items()}


def _rejoined(
    draft: ShardDraft, digests: Sequence[Sequence[str]], build: Build, quiet: bool
) -> dict[str, tuple[Path, int]]:
    """Write the samples again, so that those that share a picture are in one split; (folder, samples) of each.

    The draft was written by the smallest digest of each sample: which ones share a picture is known at its end. It
    stays as it is, so that a killed build can continue. If no sample changes its split, nothing is written or returned.
    """
    before = [build.split_of(min(one)) for one in digests]
    after = [build.split_of(one) for one in representatives(digests)]
    if before == after:
        return {}
    indexes = {name: build_index(draft.folder / name, quiet=quiet, elsewhere=False) for name in set(before)}
    tars: dict[str, NumberedTars] = {}
    for name in draft.tars:
        folder = draft.folder / f"{name}.joined"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        tars[name] = NumberedTars(folder, build.max_samples)
    read = Counter[str]()
    moves = zip(before, after, strict=True)
    for source, target in progress(moves, "joining samples that share pictures", len(before), quiet):
        index, i = indexes[source], read[source]
        tars[target].write(str(index.keys[i]), dict(index.read(i)))
        read[source] += 1
    for one in tars.values():
        one.close()
    return {name: (one.folder, one.count) for name, one in tars.items()}


def _drawn(digests: Sequence[Sequence[str]]) -> str:
    """How samples are drawn, for an error."""
    if (most := most_connected(digests)) < 2:
        return "which are drawn one by one"
    return f"of which {most} share pictures, also through each other, and stay together"
