"""Sampling images code by code. Legend: B images, H/W rows and columns of codes, K codes of the book, D width."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.code_gpt import Cache, CodeGPT
from mmlab.model.conditioner import Condition
from mmlab.model.config import CodeSamplerConfig
from mmlab.weights import finite

OnRow = Callable[[int, Tensor], None]
"""Called after each row with its number, from 1, and the codes int64 `[B, H, W]`, whose later rows are not set yet."""


class CodeSampler:
    """Draws codes from logits.

    Args:
        config: settings.
    """

    def __init__(self, config: CodeSamplerConfig):
        self.config = config

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Return the probability of each code, float64 `[B, K]`."""
        temperature, top_k, top_p = self.config.temperature, self.config.top_k, self.config.top_p
        logits = logits_BK.double()
        if temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        # The maximum becomes 0: a temperature close to 0 would make the others infinite.
        logits = (logits - logits.amax(1, keepdim=True)) / temperature
        if top_k is not None and top_k < logits.shape[1]:
            least = logits.topk(top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        shares = logits.softmax(1)
        if top_p is not None and top_p < 1:
            falling, order = shares.sort(dim=1, descending=True, stable=True)
            # A code stays if those before it do not reach p: the first one always does.
            nucleus = falling.masked_fill(falling.cumsum(1) - falling >= top_p, 0.0)
            shares = torch.zeros_like(shares).scatter(1, order, nucleus)
            shares = shares / shares.sum(1, keepdim=True)
        return shares

    def choose(self, logits_BK: Tensor, drawn_B: Tensor) -> Tensor:
        """Return the codes, int64 `[B]`, in whose intervals of [0, 1) the drawn numbers lie."""
        reached = self.probabilities(logits_BK).cumsum(1)
        total = reached[:, -1:].contiguous()
        codes = torch.searchsorted(reached, drawn_B.to(reached)[:, None] * total, right=True)
        # Rounding may carry a number just below 1 past the last possible code.
        return torch.minimum(codes, torch.searchsorted(reached, total))[:, 0]


@torch.no_grad()
def sample_codes(
    prior: CodeGPT,
    sampler: CodeSampler,
    drawn_BHW: Tensor,
    condition: Condition,
    null: Condition,
    cached: bool = True,
    sliding: bool | None = None,
    on_row: OnRow | None = None,
) -> Tensor:
    """Sample the codes of images, int64 `[B, H, W]`; image b depends only on row b of the arguments.

    Images of the trained size are one sequence. Larger ones are sampled in a window of that size around each code, as
    near to the middle as the image's edges allow (Taming Transformers, section 3.2); at the trained size, that is the
    same.

    Args:
        prior: the transformer, in eval mode.
        sampler: draws codes from logits.
        drawn_BHW: numbers in [0, 1), one for each code.
        condition: of the images; an aligned context has H·W tokens.
        null: the condition of dropped rows, of the same shape; not used with guidance 1.
        cached: cache keys and values; otherwise each step runs all tokens again.
        sliding: use the window; None: for larger images.
        on_row: see `OnRow`.

    Raises:
        ConfigError: images smaller than those that the prior was trained on.
        RunError: logits that are not finite.
    """
    _, height, width = drawn_BHW.shape
    if min(height, width) < prior.side:
        raise ConfigError(
            f"The prior was trained on images of {prior.side} x {prior.side} codes; {height} x {width} is too small."
        )
    guided = sampler.config.guidance != 1
    rows = {name: torch.cat([value, null[name]]) for name, value in condition.items()} if guided else condition
    sampling = _Sampling(prior, sampler, drawn_BHW, rows, guided, on_row)
    larger = (height, width) != (prior.side, prior.side)
    return sampling.sliding() if (larger if sliding is None else sliding) else sampling.raster(cached)


@dataclass
class _Sampling:
    """One call of `sample_codes`; with guidance, `rows` are the condition's rows and then the null's."""

    prior: CodeGPT
    sampler: CodeSampler
    drawn: Tensor
    rows: Condition
    guided: bool
    on_row: OnRow | None

    def raster(self, cached: bool) -> Tensor:
        """Sample all codes as one sequence."""
        batch, height, width = self.drawn.shape
        codes = self._empty()
        flat, drawn = codes.view(batch, -1), self.drawn.flatten(1)
        cache = Cache() if cached else None
        hidden = self.prior.read(self._both(flat[:, :0]), self.rows, cache)[:, -1]
        for n in range(height * width):
            flat[:, n] = self._choose(hidden, drawn[:, n])
            self._report(codes, n // width, n % width)
            if n + 1 == height * width:
                break
            if cache is not None:
                hidden = self.prior.extend(self._both(flat[:, n]), cache)
            else:
                hidden = self.prior.read(self._both(flat[:, : n + 1]), self.rows)[:, -1]
        return codes

    def sliding(self) -> Tensor:
        """Sample each code in the window around it."""
        _, height, width = self.drawn.shape
        side, codes = self.prior.side, self._empty()
        for row in range(height):
            for column in range(width):
                top = min(max(row - side // 2, 0), height - side)
                left = min(max(column - side // 2, 0), width - side)
                window = codes[:, top : top + side, left : left + side].flatten(1)
                before = self._both(window[:, : (row - top) * side + column - left])
                hidden = self.prior.read(before, self._within(top, left))[:, -1]
                codes[:, row, column] = self._choose(hidden, self.drawn[:, row, column])
                self._report(codes, row, column)
        return codes

    def _within(self, top: int, left: int) -> Condition:
        """Return the condition of a window, with only its tokens of an aligned context."""
        if not self.prior.aligned:
            return self.rows
        side, (height, width) = self.prior.side, self.drawn.shape[1:]
        context = self.rows["context"].unflatten(1, (height, width))
        return {**self.rows, "context": context[:, top : top + side, left : left + side].flatten(1, 2)}

    def _choose(self, hidden_BD: Tensor, drawn_B: Tensor) -> Tensor:
        logits = finite(self.prior.logits(hidden_BD), "The prior's logits have").float()
        if self.guided:
            conditional, null = logits.chunk(2)
            logits = null + self.sampler.config.guidance * (conditional - null)
        return self.sampler.choose(logits, drawn_B)

    def _both(self, codes: Tensor) -> Tensor:
        return torch.cat([codes, codes]) if self.guided else codes

    def _empty(self) -> Tensor:
        return torch.zeros(self.drawn.shape, dtype=torch.int64, device=self.prior.embed.weight.device)

    def _report(self, codes: Tensor, row: int, column: int) -> None:
        if self.on_row is not None and column + 1 == codes.shape[2]:
            self.on_row(row + 1, codes)
