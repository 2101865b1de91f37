"""Compiled layers compute what layers compute, for all batches with a few compilations, and only when they are on."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from mmlab.config.errors import ConfigError
from mmlab.model import compiled_layers
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.compiled_layers import CompiledLayers
from mmlab.model.config import LanguageModelConfig
from mmlab.model.language import LanguageModel
from tests.model import tiny
from tests.model.test_activation_checkpointing import frozen_language, prior, transformer, unet

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# Rows, tokens, segments in each row, and whether they share the first one.
BATCHES = [
    (1, 64, 3, False),
    (1, 61, 5, True),
    (2, 70, 4, True),
    (3, 57, 1, False),
    (2, 65, 7, True),
    (1, 100, 1, False),
]


@pytest.fixture(autouse=True)
def compiler(monkeypatch) -> Iterator[None]:
    """A backend that needs no compiler, and nothing that was compiled before."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The loss, and the gradients of all weights that have one."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = run(model)
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]


def assert_close(one: list[Tensor], other: list[Tensor], error: float = 1e-5) -> None:
    assert len(one) == len(other) > 1
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= error * max(1e-3, float(a.abs().max()))


@pytest.mark.parametrize(
    ("build", "recompute", "backend"),
    [
        (frozen_language, True, "eager"),
        (prior, True, "aot_eager"),
        (transformer, False, "aot_eager"),
        (unet, True, "eager"),
    ],
)
def test_compiled_layers_compute_the_same(build, recompute, backend, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    torch.manual_seed(0)
    model, run = build(tokenizer_folder)
    names, plain = list(model.state_dict()), gradients(model, run)
    layers = CompiledLayers(model)
    if recompute:
        checkpoint_activations(model)
    assert_close(plain, gradients(model, run))
    assert graphs() == 0, "nothing is compiled while it is off"
    layers.on = True
    assert_close(plain, gradients(model, run))
    once = graphs()
    assert 0 < once <= layers.count
    assert_close(plain, gradients(model, run))
    assert graphs() == once
    assert list(model.state_dict()) == names


def batch(rows: int, length: int, count: int, shares: bool, seed: int) -> tuple[Any, ...]:
    """Token ids, kept positions, targets and segments of rows, and whether they are packed."""
    rng = torch.Generator().manual_seed(seed)
    segments, contexts, places = (torch.zeros(rows, length, dtype=torch.int64) for _ in range(3))
    for row in range(rows):
        cuts = (torch.randperm(length - 20, generator=rng)[: count - 1].sort().values + 10).tolist()
        edges = [0, *cuts, length - 3]
        for number, (start, end) in enumerate(pairwise(edges), 1):
            segments[row, start:end] = number
            shared = shares and number > 1
            contexts[row, start:end] = int(shared)
            places[row, start:end] = torch.arange(end - start) + edges[1] * shared
    keep = (segments > 0) & (torch.rand(rows, length, generator=rng) < 0.5)
    ids, targets = (torch.randint(200, (size,), generator=rng) for size in (rows * length, int(keep.sum())))
    return ids.view(rows, length), keep, targets, segments, contexts, places, count > 1


def loss_of(batch: tuple[Any, ...], model: Any) -> Tensor:
    return model.cross_entropy(model.embed(batch[0]), *batch[1:]) / len(batch[2])


@pytest.mark.parametrize(
    ("kind", "attention", "loss", "most"),
    [
        # Blocks are outside of what is compiled, which then has several pieces, for one row and for more.
        ("llama", "blocks", "chunked", 16),
        ("llama", "auto", "logits", 6),
        ("llama", "eager", "chunked", 6),
        ("bloom", "eager", "logits", 4),
    ],
)
def test_batches_of_any_size_compute_the_same_with_few_graphs(kind, attention, loss, most, tokenizer_folder):
    torch.manual_seed(0)
    architecture = {**tiny.LANGUAGE, **tiny.UNMASKED}[kind] | SIZE
    settings = {"init": "random", "architecture": architecture, "attention": attention, "loss": loss}
    model = LanguageModel(LanguageModelConfig(tokenizer=str(tokenizer_folder), **settings)).train()
    layers = CompiledLayers(model)
    for number, shape in enumerate(BATCHES):
        run = partial(loss_of, batch(*shape, seed=number))
        layers.on = False
        plain = gradients(model, run)
        layers.on = True
        assert_close(plain, gradients(model, run))
    assert 0 < graphs() <= most
    once = graphs()
    for number, (rows, length, count, shares) in enumerate(BATCHES):
        gradients(model, partial(loss_of, batch(rows, length + 5, count, shares, seed=number)))
    assert graphs() == once


def test_images_of_any_number_are_encoded_with_few_graphs():
    encoder = tiny.vision("siglip")
    CompiledLayers(encoder).on = True
    for number in (1, 4, 2, 7, 1, 3):
        with torch.no_grad():
            encoder(torch.zeros(number, 3, 16, 16, dtype=torch.uint8))
    assert 0 < graphs() <= 2


def test_the_limit_is_said_and_the_layer_still_runs(monkeypatch, capsys):
    monkeypatch.setattr(compiled_layers, "LIMIT", 1)
    encoder = tiny.vision("siglip")
    images = [torch.full((number, 3, 16, 16), 9, dtype=torch.uint8) for number in (2, 1)]
    with torch.no_grad():
        plain = [encoder(image) for image in images]
        CompiledLayers(encoder).on = True
        compiled = [encoder(image) for image in images]
    assert_close(plain, compiled)
    error = capsys.readouterr().err
    assert error.count("WARNING: a layer was compiled for 1 kinds of inputs, which is the limit") == 1
    assert "TORCH_LOGS=recompiles" in error and "\n" not in error.strip()


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match=r"trainer\.compile=true, but this model has no layers to compile"):
        CompiledLayers(nn.Sequential(nn.Linear(2, 2)))


def sized(number: int) -> Callable[[nn.Module], Tensor]:
    """The loss of a batch whose length depends on its number."""
    return partial(loss_of, batch(2, 40 + 37 * (number % 3), 3, False, seed=number))


def test_kernels_do_not_depend_on_the_first_batch_and_are_read_again(tokenizer_folder, tmp_path, monkeypatch):
    """By torch's own backend: a run that resumes with a batch of another length ends with the same bits."""
    monkeypatch.setattr(compiled_layers, "BACKEND", "inductor")
    settings = {"init": "random", "architecture": tiny.LANGUAGE["llama"] | SIZE | {"num_hidden_layers": 1}}

    def start(cache: str) -> tuple[Any, torch.optim.Optimizer]:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / cache))
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = LanguageModel(LanguageModelConfig(tokenizer=str(tokenizer_folder), **settings)).train()
        layers, plain = CompiledLayers(model), gradients(model, sized(0))
        layers.on = True
        if cache == "one":
            assert_close(plain, gradients(model, sized(0)))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(number: int) -> None:
        gradients(model, sized(number))
        optimizer.step()

    model, optimizer = start("one")
    for number in range(4):
        step(number)
    state = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    step(4)
    whole = model.state_dict()
    assert counters["inductor"]["fxgraph_cache_miss"] and not counters["inductor"]["fxgraph_cache_hit"]

    model, optimizer = start("other")
    optimizer.load_state_dict(state[0])
    model.load_state_dict(state[1])
    step(4)
    assert all(torch.equal(whole[name], weight) for name, weight in model.state_dict().items())

    model, optimizer = start("one")
    step(5)
    assert counters["inductor"]["fxgraph_cache_hit"] and not counters["inductor"]["fxgraph_cache_miss"]
