"""Samples per second from an HTTP server on loopback: our loader and webdataset's stream, beside our loader from disk.

The shards hold JPEG files of 384 px with captions. `pictures` decodes them to 224 px; `files` decodes nothing, which
leaves the cost of reading. All three use the same number of workers and the same code to decode; webdataset reads with
`pipe:curl`. The server is a process of its own and sends without a limit, or as object stores do,
with a limit for each connection and some milliseconds before each answer. Our cache is empty at the start of each
reading and has room for half of the shards. The first quarter of each reading is not timed; the rest is until the last
batch. Rounds are interleaved; medians, and the smallest and largest value, are reported.

    python benchmarks/remote_reading.py [rounds [workers]]
"""

import io
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

from mmlab.data.batch_loader import LocalLoader, quiet_worker
from mmlab.data.config import CacheConfig, ShardsConfig, SourceConfig
from mmlab.data.mixture import open_sources
from mmlab.data.reader import GlobalBatches, LocalBatches, decoded
from mmlab.data.sample_types import ImageSpec, Prepared, Sample
from mmlab.data.shard_files import ShardWriter

SIDE, BATCH, BLOCK = 384, 30, 2
# Bytes per second of a connection (0: no limit), and seconds before each answer.
SERVERS = {"no limit": (0.0, 0.0), "50 MB/s and 20 ms": (50e6, 0.02), "20 MB/s and 20 ms": (20e6, 0.02)}
_PIECE = 1 << 18


class Pictures:
    """Decoded pictures of 224 px."""

    shards, per_shard = 24, 150
    image = ImageSpec(224)
    members: tuple[str, ...] = ()

    def prepare(self, sample: Sample) -> Prepared:
        return Prepared(sample.pictures[0].tiles[0], {})

    def batch(self, contents: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack(contents)}


class Files:
    """The stored files, which nobody decodes."""

    shards, per_shard = 12, 960  # of 48 MB: three ranges
    image = None
    members = ("jpg",)

    def prepare(self, sample: Sample) -> Prepared:
        return Prepared(len(sample.members["jpg"]), {})

    def batch(self, contents: list[Any]) -> dict[str, Any]:
        return {"x": torch.tensor(contents)}


class _Handler(BaseHTTPRequestHandler):
    """Serves files with ranges and ETags; `rate` and `latency` come first in the path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    folder = Path()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        rate, latency, name = self.path.strip("/").split("/", 2)
        file = self.folder / name
        time.sleep(float(latency))
        if not file.is_file():
            return self.send_error(404)
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(match[1]), min(int(match[2]) + 1, size)) if match else (0, size)
        self.send_response(206 if match else 200)
        self.send_header("ETag", f'"{size}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(stop - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self._send(file, start, stop, float(rate))

    def _send(self, file: Path, start: int, stop: int, rate: float) -> None:
        began, first = time.monotonic(), start
        with file.open("rb") as stream:
            while start < stop:
                start += self.connection.sendfile(stream, start, min(_PIECE, stop - start))
                if rate:
                    time.sleep(max(0.0, began + (start - first) / rate - time.monotonic()))


def serve(folder: Path) -> None:
    """Serve a folder until standard input ends; prints the port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"folder": folder}))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients stop when they have enough
    print(server.server_port, flush=True)
    server.serve_forever()


def write(folder: Path, shards: int, per_shard: int) -> None:
    """Write shards of JPEG files with captions."""
    random, files = np.random.default_rng(0), []
    for _ in range(100):
        small = random.integers(0, 256, (48, 48, 3), np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(picture + random.integers(-12, 13, picture.shape), 0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(noisy).save(stream, "JPEG", quality=85)
        files.append(stream.getvalue())
    with ShardWriter(folder, per_shard, quiet=True) as writer:
        for i in range(shards * per_shard):
            writer.write(f"{i:06}", {"jpg": files[i % len(files)], "json": {"caption": f"picture {i}"}})


def ours(path: str, collate: Any, workers: int, cache: CacheConfig) -> Iterator[Any]:
    """Batches of our loader, in random order."""
    config = ShardsConfig(
        root="",
        train=[SourceConfig(path=path, name="train")],
        global_batch=BATCH,
        micro_batch=BATCH,
        seed=0,
        block_shards=BLOCK,
        cache=cache,
    )
    dataset = LocalBatches(open_sources(config, config.train), collate, GlobalBatches(BATCH, BATCH), config)
    loader = LocalLoader(dataset, collate.shards * collate.per_shard // BATCH, lambda: 0, workers)
    yield from loader
    loader.close()


def stream(urls: list[str], collate: Any, workers: int) -> Iterable[Any]:
    """Batches of webdataset, in the order of the shards."""

    def prepared(stored: dict[str, Any]) -> Any:
        members = {name: value for name, value in stored.items() if not name.startswith("__")}
        sample = Sample(stored["__key__"], "train", {}, [], 0, members, "")
        return collate.prepare(decoded(sample, collate)).content

    dataset: Any = WebDataset(urls, shardshuffle=False).map(prepared).batched(BATCH, collation_fn=collate.batch)
    return DataLoader(dataset, batch_size=None, num_workers=workers, worker_init_fn=quiet_worker)


def rate(batches: Iterable[Any], samples: int) -> float:
    """Samples per second after the first quarter."""
    skipped = samples // 4 // BATCH
    began, count = 0.0, 0
    for number, batch in enumerate(batches):
        if number == skipped:
            began = time.perf_counter()
        if number > skipped:
            count += len(batch["x"])
    seconds = time.perf_counter() - began
    assert count == samples - (skipped + 1) * BATCH, count
    return count / seconds


def main(rounds: int, workers: int) -> None:
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as base:
        for collate in (Pictures(), Files()):
            kind = type(collate).__name__.lower()
            shards = Path(base, kind)
            write(shards, collate.shards, collate.per_shard)
            command = [sys.executable, __file__, "serve", str(shards)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                port = int(server.stdout.readline())
                for name, (speed, wait) in SERVERS.items():
                    print(f"{kind}, {name}, {workers} workers", flush=True)
                    address = f"http://127.0.0.1:{port}/{speed}/{wait}"
                    results[f"{kind}, {name}"] = measure(shards, address, collate, workers, rounds)
                server.terminate()
            shutil.rmtree(shards)
    print(json.dumps(results))


def measure(shards: Path, address: str, collate: Any, workers: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds of the three; prints and returns their rates in order and the ratios of the medians."""
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    urls = [f"pipe:curl -s -f {address}/{path.name}" for path in sorted(shards.glob("*.tar"))]
    count = collate.shards * collate.per_shard
    rates: dict[str, list[float]] = {"disk": [], "remote": [], "webdataset": []}
    for number in range(rounds):
        cache = CacheConfig(folder=str(shards.with_name(f"cache-{number}")), gigabytes=size / 2 / 1e9)
        rates["disk"].append(rate(ours(str(shards), collate, workers, cache), count))
        rates["remote"].append(rate(ours(address, collate, workers, cache), count))
        rates["webdataset"].append(rate(stream(urls, collate, workers), count))
        shutil.rmtree(cache.path, ignore_errors=True)  # the fetcher may be about to end
    middle = {name: statistics.median(each) for name, each in rates.items()}
    for name, each in rates.items():
        print(f"  {name:<10} {middle[name]:>8,.0f} samples/s ({min(each):,.0f} to {max(each):,.0f})", flush=True)
    ratios = {"of_disk": middle["remote"] / middle["disk"], "of_webdataset": middle["remote"] / middle["webdataset"]}
    print(f"  remote: {ratios['of_disk']:.2f} of disk, {ratios['of_webdataset']:.2f} x webdataset", flush=True)
    return {**{name: [round(value) for value in sorted(each)] for name, each in rates.items()}, **ratios}


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5, int(sys.argv[2]) if sys.argv[2:] else 2)
