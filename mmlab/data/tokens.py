"""Text to tokens with the characters that each covers, split where a label begins."""

from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError
from mmlab.data.turns import tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[tuple[int, int, int]]
"""Id, first character, end character of each token; the bytes of an emoji share a character."""

_ANCHORS = (":", "\n", "a")
_WINDOW = 64  # characters around a cut that can change the tokens beside it


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot say which characters a token covers.

    Raises:
        ConfigError: it is not a fast tokenizer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"The tokenizer {tokenizer_name(tokenizer)} is not a fast one and gives no character offsets, "
            "which labels need; load its fast version."
        )


def leading_bos(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The beginning-of-text id where the tokenizer adds one and `text` does not spell it out."""
    bos: int | None = tokenizer.bos_token_id  # type: ignore[assignment]
    if bos is None or text.startswith(str(tokenizer.bos_token)):
        return []
    return [bos] if tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos] else []  # type: ignore[attr-defined]


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id at places without text: padding, or the end of text where the tokenizer has none, or 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if isinstance(i, int))


def tokenize(text: str, spans: list[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenise `text`, so that no token lies half inside a span.

    The text is tokenised in one go, as at inference. It is cut only at the start of a span where the text up
    to there has other tokens by itself (the prompt of inference would then not be a prefix of the training
    sequence), and at the end of a span that shares a token with text behind it.
    """
    tokens = _tokens(text, tokenizer)
    starts = [start for start, _ in spans if 0 < start < len(text)]
    cuts = [start for start in starts if _across(start, tokens) or _regrouped(text, start, tokenizer)]
    cuts += [end for _, end in spans if text[end : _across(end, tokens)].strip()]
    if not cuts:
        return tokens
    edges = [0, *sorted(set(cuts)), len(text)]
    tokens = _tokens(text[: edges[1]], tokenizer)
    for start, end in pairwise(edges[1:]):
        tokens += [(i, start + a, start + b) for i, a, b in _continued(text[start:end], tokenizer)]
    return tokens


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    # The tokenizer below transformers' wrapper: a call to the wrapper takes five times as long.
    found = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    return [(i, a, b) for i, (a, b) in zip(found.ids, found.offsets, strict=True)]


def _across(cut: int, tokens: Tokens) -> int:
    """The end of the token that begins before `cut` and ends behind it; 0 if there is none."""
    before = bisect_left(tokens, cut, key=lambda token: token[1])
    end = tokens[before - 1][2] if before else 0
    return end if end > cut else 0


def _regrouped(text: str, cut: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokens before `cut` depend on what follows, as only those of white space do."""
    if not text[cut - 1].isspace():
        return False
    left = max(0, cut - _WINDOW)
    within = _tokens(text[left : cut + _WINDOW], tokenizer)
    alone = _tokens(text[left:cut], tokenizer)
    return [i for i, a, _ in within if a < cut - left] != [i for i, _, _ in alone]


def _continued(piece: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokens of a piece from the middle of a text, without the space that some tokenizers put first."""
    for anchor in _ANCHORS:
        tokens, n = _tokens(anchor + piece, tokenizer), len(anchor)
        if all(b <= n or a >= n for _, a, b in tokens):
            return [(i, a - n, b - n) for i, a, b in tokens if a >= n]
    return _tokens(piece, tokenizer)
