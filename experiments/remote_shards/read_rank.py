"""One rank reads shards as training does: read_rank.py SETTINGS OUT, where SETTINGS is JSON of `Reading`.

OUT gets a line for each sample: key, seed, sha256 of the stored picture and of the decoded one. The last line that it
prints is one JSON object.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from mmlab.data.batch_loader import LocalLoader
from mmlab.data.config import CacheConfig, ShardsConfig, SourceConfig
from mmlab.data.mixture import open_sources
from mmlab.data.reader import GlobalBatches, LocalBatches
from mmlab.data.sample_types import ImageSpec, Prepared, Sample

BLOCK = 4
MICRO_BATCH = 16


@dataclass
class Reading:
    """What is read, by which rank, through which cache."""

    path: str
    batches: int
    cache: str
    gigabytes: float
    rank: int = 0
    world: int = 1
    workers: int = 0

    def settings(self) -> ShardsConfig:
        return ShardsConfig(
            root="",
            train=[SourceConfig(path=self.path, name="photos")],
            global_batch=MICRO_BATCH * self.world,
            micro_batch=MICRO_BATCH,
            workers=self.workers,
            seed=0,
            block_shards=BLOCK,
            bad_budget=0.0,
            cache=CacheConfig(folder=self.cache, gigabytes=self.gigabytes),
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Hashes:
    """A collate whose batches hold the hashes of the samples."""

    image: ImageSpec | None = ImageSpec(64)
    members: tuple[str, ...] = ("jpg",)

    def prepare(self, sample: Sample) -> Prepared:
        stored = sha256(sample.members["jpg"]).hexdigest()
        pixels = sha256(sample.pictures[0].tiles.numpy().tobytes()).hexdigest()
        return Prepared([sample.key, sample.seed, stored, pixels], {})

    def batch(self, contents: list[Any]) -> dict[str, Any]:
        return {"samples": contents}


def main(reading: Reading, out: Path) -> None:
    config = reading.settings()
    cut = GlobalBatches(config.global_batch, config.micro_batch, reading.world, reading.rank)
    dataset = LocalBatches(open_sources(config, config.train), Hashes(), cut, config)
    loader = LocalLoader(dataset, reading.batches, lambda: 0, config.workers)
    replaced, longest, last = 0, 0.0, time.monotonic()
    with out.open("w") as file:
        for batch in loader:
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            file.writelines(json.dumps(sample) + "\n" for sample in batch["samples"])
            replaced += len(batch["bad"])
    loader.close()
    print(json.dumps({"replaced": replaced, "longest_wait": round(longest, 2)}), flush=True)


if __name__ == "__main__":
    main(Reading(**json.loads(sys.argv[1])), Path(sys.argv[2]))
