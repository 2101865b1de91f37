"""Codes are drawn as they are likely, with and without a cache, guided or not, in pictures larger than the trained."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmlab.config.errors import ConfigError, RunError
from mmlab.model.code_sampling import CodeSampler, sample_codes
from mmlab.model.config import CodeSamplerConfig
from tests.model.tiny_priors import CODES, KINDS, SIDE, conditions, prior_model, sampling


def drawn(count: int = 3, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def draw(model: Any, sampler: CodeSampler, numbers: Tensor | None = None, **options: Any) -> Tensor:
    given = drawn() if numbers is None else numbers
    condition, null = conditions(model, len(given), given.shape[1])
    return sample_codes(model.prior, sampler, given, condition, null, **options)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_window_give_the_same_codes(kind, positions, tokenizer_folder):
    model = prior_model(kind, tokenizer_folder, positions=positions)
    sampler = sampling(temperature=0.8, top_k=9, guidance=1.0 if kind == "none" else 2.5)
    plain = draw(model, sampler)
    assert plain.shape == (3, SIDE, SIDE) and plain.dtype == torch.int64 and len(plain.unique()) > 4
    assert torch.equal(draw(model, sampler, cached=False), plain)
    assert torch.equal(draw(model, sampler, sliding=True), plain)


@pytest.mark.parametrize("kind", ["class", "map"])
@torch.no_grad()
def test_a_code_of_a_larger_picture_is_drawn_from_the_window_around_it(kind):
    model, side = prior_model(kind), 7
    sampler, numbers = sampling(top_p=0.9), drawn(2, side, side)
    codes = draw(model, sampler, numbers)
    assert codes.shape == (2, side, side)
    condition, _ = conditions(model, 2, side)
    for row, column, top, left in ((0, 0, 0, 0), (1, 3, 0, 1), (3, 4, 1, 2), (6, 6, 3, 3), (6, 0, 3, 0)):
        window = codes[:, top : top + SIDE, left : left + SIDE].flatten(1)
        told = condition
        if kind == "map":
            cells = condition["context"].unflatten(1, (side, side))
            told = {"context": cells[:, top : top + SIDE, left : left + SIDE].flatten(1, 2)}
        place = (row - top) * SIDE + column - left
        logits = model(window, told)[:, place]
        assert torch.equal(sampler.choose(logits, numbers[:, row, column]), codes[:, row, column])


def test_a_picture_may_be_wider_than_high():
    model = prior_model("class")
    codes = sample_codes(model.prior, sampling(), drawn(3, SIDE, 6), *conditions(model))
    assert codes.shape == (3, SIDE, 6)


def test_a_picture_depends_on_its_own_rows():
    model, sampler = prior_model("class"), sampling(guidance=2)
    condition, null = conditions(model)
    whole = sample_codes(model.prior, sampler, drawn(), condition, null)
    for n in range(3):
        told, untold = ({name: value[n : n + 1] for name, value in part.items()} for part in (condition, null))
        assert torch.equal(sample_codes(model.prior, sampler, drawn()[n : n + 1], told, untold)[0], whole[n])


@torch.no_grad()
def test_guidance_1_is_the_conditional_model_and_0_the_unconditional_one(monkeypatch):
    model = prior_model("class")
    condition, null = conditions(model)
    seen: list[Tensor] = []
    choose = CodeSampler.choose

    def noted(self: CodeSampler, logits: Tensor, numbers: Tensor) -> Tensor:
        seen.append(logits)
        return choose(self, logits, numbers)

    monkeypatch.setattr(CodeSampler, "choose", noted)
    found = {}
    for scale in (0.0, 1.0, 3.0):
        codes = sample_codes(model.prior, sampling(guidance=scale), drawn(), condition, null)
        found[scale] = codes, torch.stack(seen, 1)
        seen.clear()
    codes, logits = found[1.0]
    torch.testing.assert_close(logits, model(codes.flatten(1), condition), rtol=1e-4, atol=1e-5)
    codes, logits = found[0.0]
    torch.testing.assert_close(logits, model(codes.flatten(1), null), rtol=1e-4, atol=1e-5)
    codes, logits = found[3.0]
    told, untold = model(codes.flatten(1), condition), model(codes.flatten(1), null)
    torch.testing.assert_close(logits, untold + 3 * (told - untold), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[1.0][0], found[3.0][0])


def test_rows_are_told_as_they_are_written():
    model, seen = prior_model("none"), []
    codes = draw(model, sampling(), on_row=lambda row, codes: seen.append((row, codes[:, :row].clone())))
    assert [row for row, _ in seen] == [1, 2, 3, 4]
    assert all(torch.equal(part, codes[:, :row]) for row, part in seen)


LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 0.0, 5.0]])


def test_temperature_top_k_and_top_p():
    whole = sampling().probabilities(LOGITS)
    torch.testing.assert_close(whole, LOGITS.double().softmax(1))
    cool = sampling(temperature=0.5).probabilities(LOGITS)
    torch.testing.assert_close(cool, (2 * LOGITS.double()).softmax(1))
    assert sampling(temperature=0).probabilities(LOGITS).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert sampling(temperature=1e-320).probabilities(LOGITS).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    two = sampling(top_k=2).probabilities(LOGITS)
    torch.testing.assert_close(two[0], whole[0] * torch.tensor([1, 0, 1, 0]) / whole[0, [0, 2]].sum())
    assert sampling(top_k=9).probabilities(LOGITS).equal(whole)
    # 0.64, 0.24, 0.09, 0.03: the second code is needed to reach 0.7, the third is not.
    nucleus = sampling(top_p=0.7).probabilities(LOGITS)
    torch.testing.assert_close(nucleus[0], two[0])
    assert nucleus[1].tolist() == [0, 0, 0, 1]
    assert sampling(top_p=0.01).probabilities(LOGITS)[0].tolist() == [1, 0, 0, 0]
    even = sampling(top_p=0.5).probabilities(torch.zeros(1, 4))
    assert even[0].tolist() == [0.5, 0.5, 0, 0], "what reaches p is enough"
    both = sampling(top_k=3, top_p=0.6).probabilities(LOGITS)
    assert both[0].tolist() == [1, 0, 0, 0], "of the three, the first has 0.66"


def test_codes_come_as_often_as_they_are_likely():
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    sampler = sampling(top_k=3)
    codes = sampler.choose(LOGITS[:1].expand(4000, -1), numbers)
    share = codes.bincount(minlength=4).double() / 4000
    torch.testing.assert_close(share, sampler.probabilities(LOGITS)[0], rtol=0, atol=1e-3)
    edge = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for temperature in (0.0, 1.0):
        chosen = sampling(temperature=temperature, top_k=1).choose(LOGITS[:1].expand(2, -1), edge)
        assert chosen.tolist() == [0, 0], "never a code that cannot be"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sampling(temperature=-1), "must be at least 0"),
        (lambda: sampling(guidance=-1), "must be at least 0"),
        (lambda: sampling(top_k=0), "'top_k' must be above 0, not 0"),
        (lambda: sampling(top_p=0), "'top_p' must be above 0, not 0"),
        (lambda: draw(prior_model("none"), sampling(), drawn(1, 3, 9)), "4 x 4 codes; 3 x 9 is too small"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        make()


def test_the_book_is_as_large_as_the_first_stage_says():
    assert prior_model("none", codes=23).prior.head.out_features == 23 != CODES


@pytest.mark.parametrize("sliding", [False, True])
def test_logits_that_are_not_finite_are_refused(sliding):
    prior = prior_model("none").prior.eval()
    with torch.no_grad():
        prior.head.weight.fill_(3e38)
    with pytest.raises(RunError, match="The prior's logits have NaN or infinity"):
        sample_codes(prior, CodeSampler(CodeSamplerConfig()), torch.rand(1, 4, 4), {}, {}, sliding=sliding)
