"""What one point of `cost_growth.py` measures, in a process of its own: CPU seconds of a step, or bytes at its peak."""

import ctypes
import io
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, distributed, nn
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmlab.data.collate import ChatCollate
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.formats import Members
from mmlab.data.index import ShardIndex
from mmlab.data.mixture import Source
from mmlab.data.reader import GlobalBatches, LocalBatches
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_files import Samples
from mmlab.data.tally import Tally
from mmlab.model.blocks import blocks
from mmlab.model.config import LanguageModelConfig, MLPConnectorConfig, VisionEncoderConfig
from mmlab.model.connector import MLPConnector
from mmlab.model.language import LanguageModel
from mmlab.model.output_loss import chunked_cross_entropy, summed_cross_entropy
from mmlab.model.vision import VisionEncoder
from mmlab.model.vlm import VisionLanguageModel
from mmlab.stage.token_loss import supervised
from mmlab.training.config import FSDPConfig
from mmlab.training.sharding import ShardedStrategy

STEPS, BATCH = 5, 8
TEXT = 256
"""Tokens of each text in a packed row."""
POSITIONS, WIDTH = 512, 576
"""Supervised tokens and width where the vocabulary grows."""
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
EYE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
Reading = dict[str, float]


def timed(step: Callable[[int], Any], steps: int | None = None) -> Reading:
    """Medians over the steps after the first one: CPU seconds of this process, and elapsed seconds."""
    cpu, elapsed = [], []
    for n in range((steps or STEPS) + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(n)
        cpu.append(time.process_time() - cpu_start)
        elapsed.append(time.perf_counter() - start)
    return {"cpu_s": statistics.median(cpu[1:]), "elapsed_s": statistics.median(elapsed[1:])}


def peak(step: Callable[[], Any], warm: Callable[[], Any]) -> Reading:
    """Bytes that the process has resident at the peak of a step, more than before it.

    Args:
        step: what is measured.
        warm: a small step before it, which loads code.
    """
    warm()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    step()
    return {"bytes": float(status("VmHWM") - before)}


def status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def language_model(folder: Path, attention: str = "auto", sizes: dict[str, Any] = SMALL) -> LanguageModel:
    torch.manual_seed(0)
    source = str(folder / "tokenizer")
    config = LanguageModelConfig(init="random", architecture={**SMALL, **sizes}, tokenizer=source, attention=attention)
    return LanguageModel(config)


def packed_row(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, segments, contexts and places `[1, T]` of texts of `TEXT` tokens."""
    place = torch.arange(length)
    ids = torch.randint(10, 200, (1, length), generator=torch.Generator().manual_seed(0))
    return ids, (place // TEXT + 1)[None], torch.zeros(1, length, dtype=torch.int64), (place % TEXT)[None]


def row_step(model: LanguageModel, length: int) -> Callable[..., Tensor]:
    """Forward and backward pass of a packed row."""
    ids, segments, contexts, places = packed_row(length)
    keep, targets = supervised(ids, segments)

    def step(*_: Any) -> Tensor:
        model.zero_grad(set_to_none=True)
        embeds = model.embed(ids)
        loss = model.cross_entropy(embeds, keep, targets, segments, contexts, places, length > TEXT)
        loss.backward()
        return loss.detach()

    return step


def sequence_time(folder: Path, attention: str, length: int) -> Reading:
    """A step of a row of `length` tokens, with a dense mask (sdpa) or in blocks."""
    return timed(row_step(language_model(folder, attention), length), 2)


def sequence_memory(folder: Path, attention: str, length: int) -> Reading:
    model = language_model(folder, attention)
    return peak(row_step(model, length), row_step(model, 2 * TEXT))


def vocabulary_memory(folder: Path, way: str, vocabulary: int) -> Reading:
    """Output layer with its loss: all logits or chunks (way), frozen or trained (way)."""
    kind, frozen = way.split(", ")
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, WIDTH)).requires_grad_(frozen == "trained")
    targets = torch.randint(0, vocabulary, (POSITIONS,))

    def step(count: int) -> None:
        hidden.grad = weight.grad = None
        if kind == "chunks":
            chunked_cross_entropy(hidden[:count], weight, None, targets[:count]).backward()
        else:
            summed_cross_entropy(F.linear(hidden[:count], weight), targets[:count]).backward()
        hidden.grad = weight.grad = None

    return peak(lambda: step(POSITIONS), lambda: step(8))


def vision_language_model(folder: Path) -> VisionLanguageModel:
    eye = {**EYE, "model_type": "clip_vision_model", "image_size": 224, "patch_size": 28}
    vision = VisionEncoder(VisionEncoderConfig(init="random", architecture=eye))
    language = language_model(folder, sizes=EYE)
    return VisionLanguageModel(vision, partial(MLPConnector, MLPConnectorConfig(depth=2)), language)


def reading_step(folder: Path, index: ShardIndex, prompt: Prompt) -> Callable[[int], Any]:
    """A training step of a small LLaVA that reads, decodes and collates its batch in the same process."""
    model = vision_language_model(folder)
    for weight in model.vision.parameters():  # type: ignore[attr-defined]
        weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-4)
    data = ImageTextDataConfig(seed=0, max_length=1024, global_batch=BATCH, micro_batch=BATCH, pack=False)
    spec = ImageSpec(224, "stretch", model.vision.tokens_per_image)
    collate = ChatCollate(data, prompt, model.language.tokenizer, spec, model.language.vocabulary)
    batches = LocalBatches([Source("laion", index)], collate, GlobalBatches(BATCH, BATCH), data)

    def step(n: int) -> None:
        batch = batches[n]
        assert not batch["bad"], batch["bad"]
        keep, targets = supervised(batch["labels"], batch["segment_ids"])
        batch["packed"] = bool((batch["segment_ids"] > 1).any())
        loss = model.cross_entropy(batch, model.features(batch["pixel_values"]), keep, targets) / len(targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dataset_time(folder: Path, way: str, samples: int) -> Reading:
    """A step on a set of so many samples."""
    index = ShardIndex.open(folder / "sets" / str(samples))
    assert len(index) == samples
    return timed(reading_step(folder, index, Prompt(template="plain")))


def pictures_time(folder: Path, way: str, pictures: int) -> Reading:
    """A step on samples of so many pictures."""
    return timed(reading_step(folder, ShardIndex.open(folder / "pictures" / str(pictures)), Prompt()))


def picture_samples(count: int, pictures: int) -> Samples:
    """Conversations of one turn about so many noisy pictures."""
    tally = Tally()
    for i in range(count):
        members: Members = {}
        for n in range(pictures):
            pixels = np.random.default_rng((i, n)).integers(0, 256, (64, 64, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            members["jpg" if n == 0 else f"{n - 1}.jpg"] = file.getvalue()
        turns = [("human", "<image>\n" * pictures + "which is red"), ("gpt", "the picture with a red circle")]
        dialogue = [{"from": speaker, "value": text} for speaker, text in turns]
        members["json"] = json.dumps({"key": f"{i:06}", "conversations": dialogue})
        tally.written += 1
        yield f"{i:06}", members
    return tally


def ranks_time(folder: Path, way: str, world: int) -> Reading:
    """A step of each of so many ranks on a row of its own, under DDP or FSDP; the slower rank counts."""
    store = folder / f"store-{os.urandom(4).hex()}"
    options = (world, store, folder, way)
    started: Any = mp.start_processes(_rank, options, nprocs=world, join=False, start_method="fork")  # type: ignore[attr-defined]
    while not started.join():
        pass
    readings = [json.loads(Path(f"{store}-{rank}").read_text()) for rank in range(world)]
    return {name: max(reading[name] for reading in readings) for name in readings[0]}


def _rank(rank: int, world: int, store: Path, folder: Path, way: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    model = language_model(folder)
    if way == "FSDP":
        strategy = ShardedStrategy(FSDPConfig(whole_below=0))
        names = ("data_parallel", "tensor_parallel")
        strategy._device_mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=names)
        parts = nn.ModuleDict({"language": model})
        strategy.shard(parts, blocks(parts), lambda part, weight: weight.dtype)
    module: Any = Rows(model, 1024)
    if way == "DDP":
        module = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step(n: int) -> None:
        module().backward()
        optimizer.step()
        optimizer.zero_grad()

    reading = timed(step)
    Path(f"{store}-{rank}").write_text(json.dumps(reading))
    distributed.barrier()
    distributed.destroy_process_group()


class Rows(nn.Module):
    """A language model with a packed row, whose loss it returns."""

    def __init__(self, language: LanguageModel, length: int):
        super().__init__()
        self.language, self.row = language, packed_row(length)

    def forward(self) -> Tensor:
        ids, segments, contexts, places = self.row
        keep, targets = supervised(ids, segments)
        embeds = self.language.embed(ids)
        return self.language.cross_entropy(embeds, keep, targets, segments, contexts, places, True)
