"""Attention of packed rows: each way computes what a dense mask does, and one function chooses."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mmlab.model import attention, row_blocks
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.model.attention import choose, described, rows_mask
from mmlab.model.flex_mask import SIDE
from mmlab.model.packed_rows import ROWS, additive, visible
from mmlab.model.row_blocks import Layout
from tests.model import tiny

# (tokens, context) of each segment: a picture with two questions, texts, and padding at the end of the second row.
SEGMENTS = [[(150, 0), (30, 1), (41, 1), (70, 0), (9, 0)], [(5, 0), (200, 0), (20, 2)]]
LENGTH = 300


def rows(segments: list[list[tuple[int, int]]], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segment numbers, contexts, and places in the segment."""
    ids = torch.zeros(3, len(segments), length, dtype=torch.int64)
    for row, parts in enumerate(segments):
        at = 0
        for number, (size, context) in enumerate(parts, 1):
            start = parts[context - 1][0] if context else 0
            ids[:, row, at : at + size] = torch.stack(
                [torch.full((size,), number), torch.full((size,), context), torch.arange(start, start + size)]
            )
            at += size
    return ids[0], ids[1], ids[2]


def uncompiled(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
    return flex_attention(query, key, value, **options)


def by_text(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *others: Any, **options: Any) -> Tensor:
    """What a GPU's kernel computes: `[tokens, heads, D]` of texts one after the other."""
    assert options["enable_gqa"] and torch.equal(ends, others[0])
    assert others[1] == others[2] == int(ends.diff().max())
    left, out = options["window_size"][0], []
    for start, end in pairwise(ends.tolist()):
        place = torch.arange(end - start)
        apart = place[:, None] - place[None, :]
        mask = (apart >= 0) & ((left < 0) | (apart <= left))
        parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
        scale = {"enable_gqa": True, "scale": options["scale"]}
        out.append(torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, **scale).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(row_blocks, "varlen_attn", by_text)


def test_blocks_of_a_row():
    segments, contexts, _ = rows(SEGMENTS, LENGTH)
    layout = Layout(segments, contexts)
    edges = [[(b.start, b.first, b.end, b.padding) for b in row] for row in layout.blocks]
    assert edges[0] == [(0, 150, 221, False), (221, 291, 291, False), (291, 300, 300, False)]
    assert edges[1] == [(0, 5, 5, False), (5, 205, 225, False), (225, 300, 300, True)]
    assert layout.shares and sum(layout.lengths) == 2 * LENGTH
    assert not Layout(segments, torch.zeros_like(contexts)).shares


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kind", ["blocks", "flex", "varlen"])
def test_each_way_is_the_dense_mask(kind, window):
    torch.manual_seed(0)
    segments, contexts, places = rows(SEGMENTS, LENGTH)
    if kind == "varlen":
        contexts, places = torch.zeros_like(contexts), torch.arange(LENGTH).expand(2, -1)
    q, k, v = torch.randn(2, 4, LENGTH, 16), torch.randn(2, 2, LENGTH, 16), torch.randn(2, 2, LENGTH, 16)
    module = SimpleNamespace(num_key_value_groups=2, training=True, is_causal=True)
    config: Any = SimpleNamespace(sliding_window=window)
    results = []
    for one in ("dense", kind):
        mask = rows_mask(one, config, True, segments, contexts, places, q.dtype)
        x: Any = [one.clone().requires_grad_(kind != "flex") for one in (q, k, v)]  # no gradients of it on a CPU
        out, _ = attention.attend(module, *x, mask, dropout=0.0, scaling=0.3)
        out = out * (segments > 0)[:, :, None, None]
        results.append([out, *(torch.autograd.grad(out.square().sum(), x) if kind != "flex" else ())])
    for dense, other in zip(*results, strict=True):
        assert torch.allclose(dense, other, atol=2e-5)


@pytest.mark.parametrize("window", [None, 40, 300])
def test_a_block_mask_leaves_out_no_pair(window):
    """Long rows: blocks of which nothing is seen are left out, and those seen in whole need no rule."""
    segments, contexts, places = rows([[(500, 0), (100, 1), (400, 0)], [(1000, 0)]], 1000)
    mask = rows_mask("flex", SimpleNamespace(sliding_window=window), True, segments, contexts, places, torch.float32)
    seen = visible(segments, contexts)
    if window:
        seen &= places[:, :, None] - places[:, None, :] < window
    short = -1000 % SIDE
    blocks = torch.nn.functional.pad(seen, (0, short, 0, short)).unflatten(1, (-1, SIDE)).unflatten(3, (-1, SIDE))
    some, every = blocks.any(4).any(2), blocks.all(4).all(2)
    listed = mask.to_dense()[:, 0].bool()
    assert not (some & ~listed).any() and listed.sum() <= some.sum() + 8
    wholly = torch.zeros_like(some)
    for b, q in mask.full_kv_num_blocks[:, 0].nonzero().tolist():
        wholly[b, q, mask.full_kv_indices[b, 0, q, : mask.full_kv_num_blocks[b, 0, q]]] = True
    assert wholly.any() == (window != 40) and not (wholly & ~every).any()


@pytest.mark.parametrize("kind", ["auto", "blocks"])
def test_a_model_trains_with_blocks_as_with_a_dense_mask(kind, tokenizer_folder, monkeypatch):
    """Through layers that are computed again, too."""
    monkeypatch.setattr(attention, "SHORT", 16)
    segments, contexts, places = rows([[(9, 0), (5, 1), (4, 1), (6, 0)], [(10, 0), (3, 0)]], 24)
    model = tiny.language(tokenizer_folder)
    checkpoint_activations(model)
    results = []
    for wanted in ("sdpa", kind):
        model.settings.attention = wanted
        model.causal.set_attn_implementation("sdpa" if wanted == "sdpa" else ROWS)
        torch.manual_seed(0)
        embeds = torch.randn(2, 24, model.width, requires_grad=True)
        logits = model(embeds, segments > 0, segments, contexts, places, packed=True)
        results.append(
            [logits, *torch.autograd.grad(logits.square().sum(), [embeds, *model.causal.model.layers.parameters()])]
        )
    assert model.ways == {described("dense", "sdpa"): None, described("blocks", kind): None}
    for dense, other in zip(*results, strict=True):
        assert torch.allclose(dense, other, rtol=1e-4, atol=1e-5 * float(dense.detach().abs().max()))


def chosen(wanted: str = "auto", device: str = "cuda", packed: Any = True, length: int = 512, **changes: Any) -> str:
    fields = {"model_type": "llama", "_attn_implementation": ROWS, "hidden_size": 64, "num_attention_heads": 4}
    config = SimpleNamespace(**{**fields, "to_dict": dict, **changes})
    embeds: Any = SimpleNamespace(device=SimpleNamespace(type=device), shape=(2, length, 64), dtype=torch.bfloat16)
    return choose(SimpleNamespace(config=config, training=True), wanted, packed, embeds)


def test_one_function_chooses():
    segments, contexts, _ = rows(SEGMENTS, LENGTH)
    shares, texts = Layout(segments, contexts), Layout(segments, torch.zeros_like(contexts))
    assert chosen(packed=False) == chosen(packed=False, device="cpu") == "plain"
    assert chosen(packed=texts) == "varlen" and chosen(packed=shares) == chosen("flex", packed=texts) == "flex"
    assert chosen(packed=False, sliding_window=128) == "flex", "a window needs a mask, too"
    assert chosen(packed=texts, hidden_size=20) == "dense", "the kernels need heads of some width"
    assert chosen(packed=texts, to_dict=lambda: {"attention_dropout": 0.1}) == "dense"
    assert chosen(device="cpu") == "blocks" and chosen(device="cpu", length=256) == "dense"
    assert chosen("blocks", "cpu", length=64) == "blocks" and chosen("flex", "cpu") == "blocks"
    assert chosen(_attn_implementation="sdpa") == chosen("flex", _attn_implementation="eager") == "dense"
    assert chosen(model_type="mamba") == "separate" and chosen(model_type="mamba", packed=False) == "plain"


def test_a_run_says_how_it_attends():
    assert described("blocks", "auto") == "attention of the language model: blocks (SDPA on each block of a row)"
    assert described("dense", "flex").endswith(
        "(one mask with all pairs of tokens), because attention=flex cannot run here"
    )


def test_masked_scores_are_finite():
    assert additive(torch.tensor([[[False]]]), torch.float16).isfinite().all()
