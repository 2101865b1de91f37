"""Pictures as codes, drawn one after the other. Legend: B pictures, H/W rows and columns of codes, K of the book."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.model.code_gpt import Cache, CodeGPT
from mmlab.model.conditioner import Condition

OnRow = Callable[[int, Tensor], None]
"""Called after each row with its number, from 1 on, and the codes int64 `[B, H, W]`; later rows mean nothing yet."""


@dataclass(frozen=True)
class CodeSampler:
    """How a code is drawn from its logits.

    Attributes:
        temperature: the logits are divided by it; 0 takes the likeliest code.
        top_k: only the k likeliest codes; None: all.
        top_p: only the likeliest codes that together reach this probability (nucleus sampling, arXiv 1904.09751,
            section 3.1), of those that `top_k` leaves; None: all.
        guidance: w in null + w · (conditional − null), on logits: 1 is the conditional model.

    Raises:
        ConfigError: a setting out of its bounds.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.guidance < 0:
            raise ConfigError("sampler.temperature and sampler.guidance must be at least 0.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampler.top_k={self.top_k} must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampler.top_p={self.top_p:g} must lie above 0 and be at most 1.")

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Of each code, float64 `[B, K]`."""
        logits = logits_BK.double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
        # The likeliest at 0: a temperature next to 0 would make infinite numbers of any other.
        logits = (logits - logits.amax(1, keepdim=True)) / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        found = logits.softmax(1)
        if self.top_p is not None and self.top_p < 1:
            falling, order = found.sort(dim=1, descending=True, stable=True)
            # A code stays where those before it do not reach p: the first one always does.
            kept = falling.masked_fill(falling.cumsum(1) - falling >= self.top_p, 0.0)
            found = torch.zeros_like(found).scatter(1, order, kept)
            found = found / found.sum(1, keepdim=True)
        return found

    def choose(self, logits_BK: Tensor, drawn_B: Tensor) -> Tensor:
        """The codes, int64 `[B]`, whose share of [0, 1) the drawn numbers lie in."""
        reached = self.probabilities(logits_BK).cumsum(1)
        total = reached[:, -1:].contiguous()
        found = torch.searchsorted(reached, drawn_B.to(reached)[:, None] * total, right=True)
        # Rounding may carry a number just below 1 past the last code that is possible.
        return torch.minimum(found, torch.searchsorted(reached, total))[:, 0]


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
    """Codes of pictures, int64 `[B, H, W]`; picture b depends on row b of what is given alone.

    Pictures of the trained size are written from one sequence. Larger ones are written through a window of that size
    around each code, as near to the middle as the picture's edges allow (Taming Transformers, section 3.2): at the
    trained size, that is the same.

    Args:
        prior: the transformer, in eval mode.
        sampler: how codes are drawn.
        drawn_BHW: numbers in [0, 1), one for each code.
        condition: what the pictures are told; an aligned context has H·W tokens.
        null: what was told in place of a dropped condition; of the same shape. Not looked at with guidance 1.
        cached: keep keys and values; else each code reads all before it again.
        sliding: use the window; None: for larger pictures.
        on_row: see `OnRow`.

    Raises:
        ConfigError: pictures smaller than those that the prior has learned.
    """
    _, height, width = drawn_BHW.shape
    if min(height, width) < prior.side:
        raise ConfigError(
            f"The prior has learned pictures of {prior.side} x {prior.side} codes; {height} x {width} are too few."
        )
    guided = sampler.guidance != 1
    rows = {name: torch.cat([value, null[name]]) for name, value in condition.items()} if guided else condition
    write = _Writer(prior, sampler, drawn_BHW, rows, guided, on_row)
    larger = (height, width) != (prior.side, prior.side)
    return write.sliding() if (larger if sliding is None else sliding) else write.raster(cached)


@dataclass
class _Writer:
    """One run of `sample_codes`; with guidance, `rows` are the condition's above the null's."""

    prior: CodeGPT
    sampler: CodeSampler
    drawn: Tensor
    rows: Condition
    guided: bool
    on_row: OnRow | None

    def raster(self, cached: bool) -> Tensor:
        """All codes as one sequence."""
        batch, height, width = self.drawn.shape
        codes = self._empty()
        flat, drawn = codes.view(batch, -1), self.drawn.flatten(1)
        cache = Cache() if cached else None
        hidden = self.prior.read(self._both(flat[:, :0]), self.rows, cache)[:, -1]
        for n in range(height * width):
            flat[:, n] = self._choose(hidden, drawn[:, n])
            self._tell(codes, n // width, n % width)
            if n + 1 == height * width:
                break
            if cache is not None:
                hidden = self.prior.extend(self._both(flat[:, n]), cache)
            else:
                hidden = self.prior.read(self._both(flat[:, : n + 1]), self.rows)[:, -1]
        return codes

    def sliding(self) -> Tensor:
        """Each code from the window around it."""
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
                self._tell(codes, row, column)
        return codes

    def _within(self, top: int, left: int) -> Condition:
        """The condition of a window: of an aligned context, the tokens in it."""
        if not self.prior.aligned:
            return self.rows
        side, (height, width) = self.prior.side, self.drawn.shape[1:]
        context = self.rows["context"].unflatten(1, (height, width))
        return {**self.rows, "context": context[:, top : top + side, left : left + side].flatten(1, 2)}

    def _choose(self, hidden_BD: Tensor, drawn_B: Tensor) -> Tensor:
        logits = self.prior.logits(hidden_BD).float()
        if self.guided:
            conditional, null = logits.chunk(2)
            logits = null + self.sampler.guidance * (conditional - null)
        return self.sampler.choose(logits, drawn_B)

    def _both(self, codes: Tensor) -> Tensor:
        return torch.cat([codes, codes]) if self.guided else codes

    def _empty(self) -> Tensor:
        return torch.zeros(self.drawn.shape, dtype=torch.int64, device=self.prior.embed.weight.device)

    def _tell(self, codes: Tensor, row: int, column: int) -> None:
        if self.on_row is not None and column + 1 == codes.shape[2]:
            self.on_row(row + 1, codes)
