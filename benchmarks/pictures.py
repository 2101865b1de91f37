"""Contest: from JPEGs of 640 px to normalized batches, beside what people write with webdataset and with torch.

All read the same files with two worker processes: decode, resize the shorter side to 336 px, crop, normalize, batch.
The peers do that as their tutorials do: `decode("pil")` or `Image.open`, and torchvision's transforms, written out here
(Pillow's bicubic resize, CHW floats, mean and deviation). Ours hands over uint8 batches, which are normalized in the
main process, as a training step does. The start of the workers is part of the time. Pictures are put together from the
photos of a folder of JPEGs that PHOTOS names, or else drawn, with as many bytes a pixel as photos.

    python benchmarks/pictures.py [ROUNDS]
    PHOTOS=FOLDER python benchmarks/pictures.py [ROUNDS]
"""

import io
import os
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from contest import Contest, Outcome, main, tiny
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
from mmlab.runs.freed_memory import keep_freed_memory

SIZE, BATCH, WORKERS = 336, 16, 2
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
        total += rng.normal(128, 6, (480, 640, 1))  # with it a JPEG of quality 90 has 88 KB, as of COCO's photos
        drawn.append(Image.fromarray(total.clip(0, 255).astype(np.uint8)))
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


def prepare(folder: Path, width: int, height: int, count: int) -> None:
    """Write the same pictures as files and as shards."""
    data = files(photos(os.environ.get("PHOTOS")), width, height, WORKERS * BATCH if tiny() else count)

    def samples() -> Any:
        for i, each in enumerate(data):
            yield f"{i:05}", {"jpg": each, "json": b"{}"}
        return Tally()

    (folder / "files").mkdir()
    for i, each in enumerate(data):
        (folder / "files" / f"{i:05}.jpg").write_bytes(each)
    write_shards(samples(), folder / "shards", max_samples=BATCH, total=len(data), quiet=True)


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


def of_mmlab(root: Path, reduced: bool = False) -> Iterator[Tensor]:
    config = ImageDataConfig(
        root=str(root), train=[SourceConfig(path="shards")], global_batch=BATCH, micro_batch=BATCH, seed=0,
        workers=WORKERS, size=SIZE, aspect="crop", reduce_jpegs=reduced,
    )  # fmt: skip
    data = ImageData(config, ImageCollate(config, Conditioning()))
    data.plan(max_epochs=1)
    keep_freed_memory()  # as a training on a CPU does; its workers inherit that
    loader = data.train_dataloader()
    for batch in loader:
        yield normalized(batch["pixel_values"], 255 * MEAN, 255 * STD, torch.float32)  # as a vision encoder does
    loader.close()


def read(folder: Path, by: Callable[[Path], Iterator[Tensor]]) -> Outcome:
    """One pass."""
    torch.set_num_threads(1)
    start, pictures = time.perf_counter(), 0
    for batch in by(folder):
        assert batch.shape[1:] == (3, SIZE, SIZE) and batch.dtype == torch.float32
        pictures += len(batch)
        seconds = time.perf_counter() - start
    return Outcome(pictures, seconds)


def contest(title: str, width: int, height: int, count: int, goals: dict[str, float]) -> Contest:
    """Beside `mmlab` there is `mmlab, reduced`, with data.reduce_jpegs=true."""
    readers = {
        "webdataset": of_webdataset,
        "files, torch": of_torch,
        "mmlab": of_mmlab,
        "mmlab, reduced": partial(of_mmlab, reduced=True),
    }
    sides = {name: partial(read, by=reader) for name, reader in readers.items()}
    return Contest(title, "pictures", sides, partial(prepare, width=width, height=height, count=count), goals)


CONTEST = contest("pictures, 640 px", 640, 480, 1536, {"mmlab": 2.4})

if __name__ == "__main__":
    main(CONTEST)
