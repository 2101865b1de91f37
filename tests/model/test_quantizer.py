from math import prod
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.model import quantizer as module
from mmlab.model.config import VectorQuantizerConfig
from mmlab.model.quantizer import VectorQuantizer, usage


def quantizer(codes: int = 16, width: int = 4, **options) -> VectorQuantizer:
    torch.manual_seed(0)
    book = VectorQuantizer(VectorQuantizerConfig(codes=codes, width=width, **options))
    with torch.no_grad():  # far from 0, where all distances are alike
        book.codebook.copy_(torch.randn(codes, width))
        if book.config.ema is not None:
            book.ema_sums.copy_(book.codebook)
    return book


def latents(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*(shape or (2, 4, 3, 5)), generator=torch.Generator().manual_seed(seed), requires_grad=True)


def slowly(book: VectorQuantizer, z_BDhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation 3 of the paper, vector by vector: (values, indices, loss per picture)."""
    values, indices, losses = torch.empty_like(z_BDhw), torch.empty_like(z_BDhw[:, 0], dtype=torch.int64), []
    for b, picture in enumerate(z_BDhw):
        loss = torch.zeros(())
        for i in range(picture.shape[1]):
            for j in range(picture.shape[2]):
                z, codes = picture[:, i, j], book.codebook
                if book.normalize:
                    z, codes = z / z.norm(), codes / codes.norm(dim=1, keepdim=True)
                k = (codes - z).square().sum(1).argmin()
                values[b, :, i, j], indices[b, i, j] = codes[k], k
                loss = (
                    loss
                    + (codes[k] - z.detach()).square().sum()
                    + book.config.beta * (z - codes[k].detach()).square().sum()
                )
        losses.append(loss)
    return values, indices, torch.stack(losses)


@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_the_paper_s_equation_vector_by_vector(normalize, monkeypatch):
    monkeypatch.setattr(module, "DISTANCES", 16 * 7)  # several chunks
    book, z = quantizer(normalize=normalize), latents()
    values, indices, losses = slowly(book, z)
    out = book(z)
    assert torch.equal(out.indices, indices) and out.codes == 16
    torch.testing.assert_close(out.values, values)
    torch.testing.assert_close(out.loss, losses)
    ours = torch.autograd.grad(out.loss.sum(), (book.codebook, z))
    for mine, theirs in zip(ours, torch.autograd.grad(losses.sum(), (book.codebook, z)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_beta_weighs_the_commitment_term_alone():
    grads = {}
    for beta in (0.25, 1.0):
        book, z = quantizer(beta=beta, normalize=False), latents()
        grads[beta] = torch.autograd.grad(book(z).loss.sum(), (book.codebook, z))
    torch.testing.assert_close(grads[1.0][0], grads[0.25][0])
    torch.testing.assert_close(grads[1.0][1], grads[0.25][1] * 4)


def test_the_gradient_passes_straight_through():
    book, z = quantizer(normalize=False), latents()
    upstream = torch.randn(2, 4, 3, 5)
    book_grad, z_grad = torch.autograd.grad((book(z).values * upstream).sum(), (book.codebook, z), allow_unused=True)
    assert book_grad is None
    torch.testing.assert_close(z_grad, upstream)


def test_length_does_not_matter_on_the_sphere():
    book, z = quantizer(), latents().detach()
    out, scaled = book(z), book(7 * z)
    assert torch.equal(out.indices, scaled.indices)
    torch.testing.assert_close(out.values.norm(dim=1), torch.ones(2, 3, 5))
    torch.testing.assert_close(book.project(7 * z), F.normalize(z, dim=1))
    with torch.no_grad():
        book.codebook.mul_(5)
    torch.testing.assert_close(book(z).values, out.values)


def test_half_precision_picks_the_same_codes():
    book, z = quantizer(codes=512, normalize=False), latents(2, 4, 8, 8).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = book(z)
    assert torch.equal(out.indices, slowly(book, z)[1]) and out.values.dtype == torch.float32


def test_usage_counts_codes_and_their_perplexity():
    assert usage(torch.tensor([5, 5, 5, 5])) == pytest.approx((1.0, 4.0))
    assert usage(torch.tensor([7, 0, 0, 0])) == pytest.approx((0.25, 1.0))
    share = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert usage(share * 8)[1] == pytest.approx(float(2 ** (0.5 * 1 + 0.5 * 2)))


def step(book: VectorQuantizer, z: Tensor, number: int) -> None:
    book(z)
    book.after_step(number)


def test_dead_codes_become_distinct_latents_of_the_batch():
    book = quantizer(codes=16, normalize=False, revive_after=3).train()
    with torch.no_grad():
        book.codebook[4:] += 100  # out of reach
    before = book.codebook.detach().clone()
    z = latents(2, 4, 4, 4).detach()
    z[1] = z[1, :, :1, :1]  # a plain picture: one vector, 16 times
    for number in (1, 2):
        step(book, z, number)
        assert torch.equal(book.codebook, before), "not yet"
    used = book.uses > 0
    assert 0 < used.sum() <= 4 and book.uses.sum() == 2 * 32
    step(book, z, 3)
    assert torch.equal(book.codebook[used], before[used])
    rows = z.permute(0, 2, 3, 1).reshape(-1, 4)
    revived = book.codebook[~used].detach()
    assert all((rows == code).all(1).any() for code in revived)
    assert len(revived.unique(dim=0)) == len(revived)
    assert book.uses.sum() == 0, "counted anew"


def test_codes_in_use_are_left_alone_and_micro_batches_count_together():
    book = quantizer(codes=2, normalize=False, revive_after=1).train()
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    before = book.codebook.detach().clone()
    for side in (1.0, -1.0):  # each micro-batch uses one of the codes
        book(torch.full((1, 4, 2, 2), side))
    book.after_step(1)
    assert torch.equal(book.codebook, before)


def test_more_dead_codes_than_latents():
    book = quantizer(codes=64, normalize=False, revive_after=1).train()
    with torch.no_grad():
        book.codebook += 100
    before = book.codebook.detach().clone()
    step(book, latents(1, 4, 2, 2).detach(), 1)
    assert (book.codebook != before).any(1).sum() == 4


def test_looking_does_not_count_and_none_never_revives():
    book = quantizer(revive_after=5).train()
    with torch.no_grad():
        book(latents())
    book.eval()(latents())
    book.after_step(1)
    assert book.uses.sum() == 0
    step(book.train(), latents(), 2)
    assert book.uses.sum() == 30
    book = quantizer().train()
    before = book.codebook.detach().clone()
    step(book, latents(), 1)
    assert torch.equal(book.codebook, before)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_going_on_from_a_state_is_exact(ema):
    def steps(book: VectorQuantizer, numbers: range) -> VectorQuantizer:
        for number in numbers:
            step(book, latents(2, 4, 2, 2, seed=number).detach(), number)
        return book

    whole, half, again = (quantizer(codes=32, revive_after=4, ema=ema).train() for _ in range(3))
    steps(whole, range(1, 9))
    steps(half, range(1, 6))
    again.load_state_dict(half.state_dict())
    steps(again, range(6, 9))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    assert not torch.equal(whole.codebook, quantizer(codes=32).codebook)


def _rank(rank: int, folder: Path, ema: float | None) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    book = quantizer(codes=16, normalize=False, revive_after=2, ema=ema).train()
    with torch.no_grad():
        book.codebook[4:] += 100
    for number in (1, 2):
        z = latents(2, 4, 3, 3, seed=10 * number + rank).detach()
        # Plain pictures: the second rank has fewer distinct latents than there are dead codes.
        step(book, z[:, :, :1, :1].expand_as(z) if rank and number == 2 else z, number)
        if number == 1:
            torch.save(book.uses.clone(), folder / f"uses-{rank}.pt")
    torch.save(book.state_dict(), folder / f"book-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ema", [None, 0.9])
def test_ranks_count_together_and_keep_one_codebook(tmp_path, ema):
    mp.start_processes(_rank, (tmp_path, ema), nprocs=2, start_method="fork")
    uses = [torch.load(tmp_path / f"uses-{rank}.pt") for rank in (0, 1)]
    books = [torch.load(tmp_path / f"book-{rank}.pt") for rank in (0, 1)]
    assert torch.equal(uses[0], uses[1]) and uses[0].sum() == 2 * prod((2, 3, 3))
    assert all(torch.equal(value, books[1][name]) for name, value in books[0].items())
    assert (books[0]["codebook"] < 50).all(), "all dead codes were revived"


def _averaging_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    book = quantizer(codes=8, normalize=False, ema=0.9).train()
    step(book, latents(2, 4, 3, 3, seed=20 + rank).detach(), 1)
    torch.save(book.state_dict(), folder / f"book-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_move_an_average_as_one_process_does(tmp_path):
    mp.start_processes(_averaging_rank, (tmp_path,), nprocs=2, start_method="fork")
    whole = quantizer(codes=8, normalize=False, ema=0.9).train()
    step(whole, torch.cat([latents(2, 4, 3, 3, seed=20 + rank) for rank in (0, 1)]).detach(), 1)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"book-{rank}.pt"), dict(whole.state_dict()))


def test_beta_of_released_checkpoints_is_on_the_other_term():
    grads = {}
    for legacy in (False, True):
        book, z = quantizer(beta=0.25, normalize=False, legacy=legacy), latents()
        grads[legacy] = torch.autograd.grad(book(z).loss.sum(), (book.codebook, z))
    torch.testing.assert_close(grads[True][0], grads[False][0] * 0.25)
    torch.testing.assert_close(grads[True][1], grads[False][1] * 4)


def test_codes_follow_the_mean_of_their_latents():
    book = quantizer(codes=8, normalize=False, ema=0.9).train()
    assert not list(book.parameters()), "nothing for an optimizer"
    start, z = book.codebook.clone(), latents(3, 4, 4, 4).detach()
    indices = book(z.requires_grad_()).indices
    assert torch.equal(book.codebook, start), "not before the step"
    book.after_step(1)
    rows, flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 4), indices.flatten()
    used = flat.unique().tolist()
    assert len(used) > 1
    for code in range(8):
        mine = rows[flat == code]
        expected = (0.9 * start[code] + 0.1 * mine.sum(0)) / (0.9 + 0.1 * len(mine)) if code in used else start[code]
        torch.testing.assert_close(book.codebook[code], expected)
    for step_ in range(200):
        step(book, z, step_)
    final = torch.stack([rows[book.indices(z.detach()).flatten() == code].mean(0) for code in used])
    torch.testing.assert_close(book.codebook[used], final, rtol=1e-3, atol=1e-3)


def test_an_average_has_the_commitment_alone_and_stays_in_float32():
    book, z = quantizer(normalize=False, ema=0.99, beta=0.5), latents()
    out = book(z)
    expected = 0.5 * (z - out.values.detach()).square().sum((1, 2, 3))
    torch.testing.assert_close(out.loss, expected)
    book.to(torch.bfloat16)
    assert book.codebook.dtype == book.ema_sums.dtype == torch.float32
    with pytest.raises(ConfigError, match="set only one of them"):
        VectorQuantizer(VectorQuantizerConfig(codes=4, width=2, ema=0.9, legacy=True))
    with pytest.raises(ConfigError, match="'ema' must be below 1, not 1"):
        VectorQuantizer(VectorQuantizerConfig(codes=4, width=2, ema=1.0))


def test_micro_batches_move_an_average_together():
    whole, parts = (quantizer(codes=8, normalize=False, ema=0.9, revive_after=5).train() for _ in range(2))
    z = latents(4, 4, 2, 2).detach()
    step(whole, z, 1)
    for half in z.chunk(2):
        parts(half)
    parts.after_step(1)
    torch.testing.assert_close(parts.codebook, whole.codebook)
    assert torch.equal(parts.uses, whole.uses)


def test_a_revived_average_starts_anew():
    book = quantizer(codes=16, normalize=False, ema=0.9, revive_after=1).train()
    with torch.no_grad():
        book.codebook[4:] += 100
    step(book, latents(2, 4, 4, 4).detach(), 1)
    assert (book.codebook.norm(dim=1) < 20).all() and (book.ema_uses[4:] == 1).all()
    torch.testing.assert_close(book.ema_sums[4:], book.codebook[4:])
