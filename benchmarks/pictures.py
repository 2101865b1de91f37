"""Pictures per second from JPEGs to normalized batches, beside what people write with webdataset and with torch.

All read the same files with two worker processes: decode, resize the shorter side to 336 px, crop, normalize, batch.
The peers do that as their tutorials do: `decode("pil")` or `Image.open`, and torchvision's transforms, written out here
(Pillow's bicubic resize, CHW floats, mean and deviation). Ours hands over uint8 batches, which are normalized in the
main process, as a training step does. `reduced` is data.reduce_jpegs=true. A start of the workers is part of each
measurement, which is a process of its own. CPU time is that of all processes; it depends less than the rate on what
else the machine does. Rounds are interleaved, and medians and ranges are reported. Pictures are put together from the
photos of FOLDER (any JPEGs), or else drawn.

    python benchmarks/pictures.py [FOLDER] [rounds]
"""

import io
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmlab.data.config import ImageDataConfig, SourceConfig
from mmlab.data.image_collate import ImageCollate
from mmlab.data.image_condition import Conditioning
from mmlab.data.module import ImageData
from mmlab.data.shard_files import write_shards
from mmlab.data.tally import Tally
from mmlab.model.preprocessing import normalized

SIZE, BATCH, WORKERS = 336, 16, 2
CASES = {"640 px": (640, 480, 2048), "2048 px": (2048, 1536, 384), "12 megapixels": (4000, 3000, 96)}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def photos(folder: str | None) -> list[Image.Image]:
    """Photos of 640 × 480 px, of which larger ones are mosaics: sharp everywhere, as the originals are."""
    if folder is not None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:50]
        return [Image.open(path).convert("RGB").resize((640, 480), Image.Resampling.LANCZOS) for path in paths]
    drawn = []
    for seed in range(8):
        rng, total = np.random.default_rng(seed), np.zeros((480, 640, 3))
        for octave in range(1, 8):  # the spectrum of photos: amplitude falls with frequency
            noise = rng.normal(128, 256 / octave**2, (3 * 2**octave // 2, 2 * 2**octave, 3)).clip(0, 255)
            layer = Image.fromarray(noise.astype(np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
            total += (np.asarray(layer) - 128.0) / octave
        drawn.append(Image.fromarray((128 + total).clip(0, 255).astype(np.uint8)))
    return drawn


def files(tiles: list[Image.Image], width: int, height: int, count: int) -> list[bytes]:
    """JPEGs of quality 90; a few pictures in turn."""
    draw, different = random.Random(0), []
    for _ in range(min(8, count)):
        picture, file = Image.new("RGB", (width, height)), io.BytesIO()
        for y in range(0, height, 480):
            for x in range(0, width, 640):
                picture.paste(draw.choice(tiles), (x, y))
        picture.save(file, "JPEG", quality=90)
        different.append(file.getvalue())
    return [different[i % len(different)] for i in range(count)]


def transform(picture: Image.Image) -> Tensor:
    """torchvision's Resize(336, BICUBIC), CenterCrop(336), ToTensor() and Normalize(…)."""
    share = SIZE / min(picture.size)
    width, height = (round(side * share) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    picture = picture.crop((left, top, left + SIZE, top + SIZE))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
    return (pixels.float().div(255) - MEAN) / STD


class Folder(Dataset):
    """What `ImageFolder` does with a folder of files."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        with open(self.paths[i], "rb") as file:
            return transform(Image.open(file).convert("RGB"))


def of_webdataset(root: Path) -> Iterator[Tensor]:
    urls = [str(path) for path in sorted((root / "shards").glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg").map_tuple(transform)
    for (batch,) in DataLoader(data.batched(BATCH), batch_size=None, num_workers=WORKERS):
        yield batch


def of_torch(root: Path) -> Iterator[Tensor]:
    yield from DataLoader(Folder(root / "files"), BATCH, shuffle=True, num_workers=WORKERS)


def ours(root: Path, reduced: bool = False) -> Iterator[Tensor]:
    config = ImageDataConfig(
        root=str(root), train=[SourceConfig(path="shards")], global_batch=BATCH, micro_batch=BATCH, seed=0,
        workers=WORKERS, size=SIZE, aspect="crop", reduce_jpegs=reduced,
    )  # fmt: skip
    data = ImageData(config, ImageCollate(config, Conditioning()))
    data.plan(max_epochs=1)
    for batch in data.train_dataloader():
        yield normalized(batch["pixel_values"], 255 * MEAN, 255 * STD, torch.float32)  # as a vision encoder does


def cpu() -> float:
    """CPU seconds of this process and of its workers, those that still live included."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return ticks / os.sysconf("SC_CLK_TCK") + sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(name: str, root: Path) -> None:
    """Print seconds and CPU seconds of one pass, per picture."""
    torch.set_num_threads(1)
    wall, used, pictures = time.perf_counter(), cpu(), 0
    for batch in READERS[name](root):
        assert batch.shape[1:] == (3, SIZE, SIZE) and batch.dtype == torch.float32
        pictures += len(batch)
    print((time.perf_counter() - wall) / pictures, (cpu() - used) / pictures, flush=True)
    os._exit(0)  # workers that still live need not be ended one by one


def measured(name: str, root: Path) -> tuple[float, float]:
    """What `measure` prints in a process of its own."""
    command = [sys.executable, __file__, "measure", name, str(root)]
    wall, used = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(wall), float(used)


READERS: dict[str, Callable[[Path], Iterator[Tensor]]] = {
    "webdataset": of_webdataset,
    "files, torch": of_torch,
    "mmlab": ours,
    "mmlab, reduced": lambda root: ours(root, reduced=True),
}


def write(root: Path, data: list[bytes]) -> None:
    """The same pictures as files and as shards."""

    def samples() -> Any:
        for i, each in enumerate(data):
            yield f"{i:05}", {"jpg": each, "json": b"{}"}
        return Tally()

    (root / "files").mkdir()
    for i, each in enumerate(data):
        (root / "files" / f"{i:05}.jpg").write_bytes(each)
    write_shards(samples(), root / "shards", max_samples=BATCH, total=len(data), quiet=True)


def main(folder: str | None, rounds: int) -> None:
    tiles = photos(folder)
    print(f"{'':<14} {'':<16} {'pictures/s':>10} {'range':>13} {'of webdataset':>14} {'CPU ms':>7} {'ratio':>6}")
    for case, (width, height, count) in CASES.items():
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in READERS}
        with tempfile.TemporaryDirectory() as base:
            root = Path(base)
            write(root, files(tiles, width, height, count))
            for _ in range(rounds):
                for name in READERS:
                    times[name].append(measured(name, root))
        middle = {name: [statistics.median(part) for part in zip(*each, strict=True)] for name, each in times.items()}
        first_wall, first_cpu = middle["webdataset"]
        for name, (wall, used) in middle.items():
            rates = sorted(1 / each for each, _ in times[name])
            print(
                f"{case:<14} {name:<16} {1 / wall:>10.1f} {f'{rates[0]:.0f}–{rates[-1]:.0f}':>13} "
                f"{first_wall / wall:>13.2f}x {used * 1e3:>7.2f} {first_cpu / used:>5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    rest = sys.argv[1:]
    rounds = int(rest.pop()) if rest and rest[-1].isdigit() else 5
    main(rest[0] if rest else None, rounds)
