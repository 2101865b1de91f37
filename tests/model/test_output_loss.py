"""Cross-entropy by chunks of positions: the loss and the gradients are those of all logits at once."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmlab.model.output_loss import LARGE, by_chunks, chunked_cross_entropy, linear_head, summed_cross_entropy
from tests.model import tiny

S, D, V = 37, 16, 101


def results(chunk: int | None, dtype: torch.dtype, bias: bool = False, learns: bool = True) -> list[Tensor]:
    """The loss and the gradients of hidden states, weight and bias, twice as large as those of the sum."""
    torch.manual_seed(0)
    hidden = torch.randn(S, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=learns)
    offset = torch.randn(V, dtype=dtype, requires_grad=learns) if bias else None
    targets = torch.randint(0, V, (S,))
    if chunk is None:
        loss = F.cross_entropy(F.linear(hidden, weight, offset).to(torch.promote_types(dtype, torch.float32)), targets)
        loss = loss * S
    else:
        loss = chunked_cross_entropy(hidden, weight, offset, targets, chunk)
    inputs = [x for x in (hidden, weight, offset) if x is not None and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(2 * loss, inputs)]


@pytest.mark.parametrize("chunk", [1, 10 * V, S * V, 10**9])
@pytest.mark.parametrize(("bias", "learns"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_chunks_change_nothing(chunk, bias, learns, dtype, error):
    whole, chunked = results(None, dtype, bias, learns), results(chunk, dtype, bias, learns)
    assert len(whole) == len(chunked) == 2 + learns * (1 + bias)
    for one, other in zip(whole, chunked, strict=True):
        assert one.dtype == other.dtype and torch.allclose(one, other, rtol=error, atol=error)


def test_autocast_rounds_as_with_logits():
    """The products are in bf16, the sum is not."""
    losses, gradients = [], []
    for chunk in (None, 8 * V):
        torch.manual_seed(0)
        hidden, weight = torch.randn(S, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        targets = torch.randint(0, V, (S,))
        with torch.autocast("cpu", torch.bfloat16):
            if chunk is None:
                loss = summed_cross_entropy(F.linear(hidden, weight), targets)
            else:
                loss = chunked_cross_entropy(hidden, weight, None, targets, chunk)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, [hidden, weight]))
    assert losses[1].dtype == torch.float32 and torch.allclose(*losses, rtol=1e-6)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.allclose(one, other, rtol=1e-2, atol=1e-2 * float(one.abs().max()))


class Largest(TorchDispatchMode):
    """Notes the most elements that a result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_there_are_never_all_logits():
    with Largest() as largest:
        results(4 * V, torch.float32)
    assert largest.elements < S * V
    with Largest() as largest:
        results(None, torch.float32)
    assert largest.elements == S * V


def test_tied_embeddings_get_both_gradients(tokenizer_folder):
    model = tiny.language(tokenizer_folder)
    model.causal.config.tie_word_embeddings = True
    model.causal.tie_weights()
    assert model.causal.get_output_embeddings().weight is model.causal.get_input_embeddings().weight
    row = torch.arange(5, 25)[None]
    one, keep, place = torch.ones_like(row), torch.ones_like(row).bool(), torch.arange(20)[None]
    gradients = []
    for model.settings.loss in ("logits", "chunked"):
        model.zero_grad()
        model.cross_entropy(model.embed(row), keep, row[0], one, one - 1, place, False).backward()
        weight = model.causal.get_input_embeddings().weight
        assert weight.grad is not None
        gradients.append(weight.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_where_chunks_are_used(tokenizer_folder):
    model = tiny.language(tokenizer_folder).causal
    head = linear_head(model)
    assert head is not None
    plain = torch.float32, "cpu"
    positions = -(-LARGE // head.out_features)
    assert not by_chunks(model, "auto", positions, *plain), "its weight learns"
    head.requires_grad_(False)
    assert by_chunks(model, "auto", positions, *plain) and not by_chunks(model, "auto", positions - 1, *plain)
    assert by_chunks(model, "chunked", 1, *plain) and not by_chunks(model, "chunked", 0, *plain)
    assert not by_chunks(model, "logits", positions, *plain)
    assert not by_chunks(model, "chunked", 1, torch.float16, "cpu"), "its gradients need the scaler's factor"


class Adapted(nn.Linear):
    """In place of an output layer with an adapter or 4-bit weights."""


def model_of(head: Any, **config: Any) -> Any:
    config = {"model_type": "llama", **config}
    return SimpleNamespace(config=SimpleNamespace(**config), get_output_embeddings=lambda: head)


def test_other_output_layers_have_logits():
    linear = nn.Linear(4, 5)
    assert linear_head(model_of(linear)) is linear
    assert linear_head(model_of(Adapted(4, 5))) is None
    assert linear_head(model_of(linear, final_logit_softcapping=30.0)) is None
    for kind in ("cohere", "granite", "mamba"):
        assert linear_head(model_of(linear, model_type=kind)) is None
    linear.weight.to_local = None  # type: ignore[attr-defined]
    assert linear_head(model_of(linear)) is None, "a share of a weight"
