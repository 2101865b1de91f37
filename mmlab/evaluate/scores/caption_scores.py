"""Captions compared with human ones: BLEU-1 to 4, ROUGE-L and CIDEr-D, as in COCO's evaluation.

The numbers equal those of COCO's own code on the same tokens. Its tokenizer needs Java; this one gives the same tokens
for plain captions, but not for abbreviations with a full stop and rare symbols. METEOR and SPICE are missing because
they need Java.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mmlab.evaluate.scores.score_table import Reference, Row, Scores, rows_of

ORDERS = 4  # n-grams of one to four tokens
BETA = 1.2  # weight of recall in ROUGE-L
SIGMA = 6.0  # width of CIDEr-D's penalty on another length
SMALL, TINY = 1e-9, 1e-15  # in COCO's BLEU, against division by zero

Tokens = list[str]
Grams = Counter[tuple[str, ...]]

# A clitic is a separate token; a word keeps its inner hyphens, and a number its inner punctuation.
_CLITIC = r"'(?:s|re|ve|ll|d|m)\b"
_TOKEN = re.compile(
    rf"n't\b|{_CLITIC}|\d+(?:[.,:]\d+)+|[^\W_]+(?:-[^\W_]+)*?(?=n't\b)"
    rf"|[^\W_]+(?:(?:[-.]|(?!{_CLITIC})')[^\W_]+)*|[#$%&@*/+=<>]"
)


def tokens_of(caption: str) -> Tokens:
    """The tokens of a caption in lower case, without punctuation."""
    text = caption.lower().replace("’", "'").replace("cannot", "can not")
    return _TOKEN.findall(text)


def captions(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """BLEU-1 to 4, ROUGE-L, CIDEr-D and the mean length; a missing prediction is an empty caption.

    CIDEr-D depends on how rare an n-gram is among all images scored together: for few images it means little, and for
    one it is 0. It is the score of each caption.
    """
    candidates = [tokens_of(p or "") for p in predictions]
    written = [[tokens_of(answer) for answer in reference.answers] for reference in references]
    each = cider_d(candidates, written)
    long = [rouge_l(one, several) for one, several in zip(candidates, written, strict=True)]

    def row(places: list[int]) -> Row:
        scores = bleu([candidates[n] for n in places], [written[n] for n in places])
        return {
            "questions": len(places),
            **{f"bleu_{order}": score for order, score in enumerate(scores, 1)},
            "rouge_l": sum(long[n] for n in places) / len(places),
            "cider_d": sum(each[n] for n in places) / len(places),
            "words": sum(len(candidates[n]) for n in places) / len(places),
        }

    return Scores(*rows_of(references, row), each, main="cider_d")


def bleu(candidates: Sequence[Tokens], written: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to 4 of a set of captions; the reference length is that of the reference closest in length."""
    right, total = [0] * ORDERS, [0] * ORDERS
    length = closest = 0
    for tokens, references in zip(candidates, written, strict=True):
        most: Grams = Counter()
        for reference in references:
            most |= _grams(reference)
        for gram, count in _grams(tokens).items():
            right[len(gram) - 1] += min(count, most[gram])
        for order in range(ORDERS):
            total[order] += max(0, len(tokens) - order)
        length += len(tokens)
        closest += min((abs(len(r) - len(tokens)), len(r)) for r in references)[1]
    ratio = (length + TINY) / (closest + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(ORDERS):
        product *= (right[order] + TINY) / (total[order] + SMALL)
        scores.append(penalty * product ** (1 / (order + 1)))
    return scores


def rouge_l(candidate: Tokens, written: Sequence[Tokens]) -> float:
    """ROUGE-L of one caption: the F-score of the best precision and the best recall among its references."""
    common = [_common(candidate, reference) for reference in written]
    precision = max(common) / max(1, len(candidate))
    recall = max(c / max(1, len(r)) for c, r in zip(common, written, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(candidates: Sequence[Tokens], written: Sequence[Sequence[Tokens]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10; document frequencies are counted over the references of all captions."""
    counted = [[_grams(reference) for reference in references] for references in written]
    seen: Counter[tuple[str, ...]] = Counter()
    for references in counted:
        seen.update(set().union(*references))
    pictures = math.log(len(written))

    def weigh(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * (pictures - math.log(max(1, seen[gram])))
        return vectors

    scores = []
    for tokens, references in zip(candidates, counted, strict=True):
        ours = weigh(_grams(tokens))
        total = 0.0
        for grams in references:
            # Lengths are counted in pairs of tokens, one less than the tokens.
            length = sum(count for gram, count in grams.items() if len(gram) == 2)
            away = max(0, len(tokens) - 1) - length
            similar = sum(map(_similarity, ours, weigh(grams)))
            total += similar / ORDERS * math.exp(-(away**2) / (2 * SIGMA**2))
        scores.append(10 * total / len(references))
    return scores


def _similarity(ours: dict[tuple[str, ...], float], theirs: dict[tuple[str, ...], float]) -> float:
    """The cosine of two weighted vectors, with our weights clipped to theirs."""
    dot = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
    norm = math.sqrt(_square(ours.values()) * _square(theirs.values()))
    return dot / norm if norm else 0.0


def _square(weights: Iterable[float]) -> float:
    return sum(weight**2 for weight in weights)


def _grams(tokens: Tokens) -> Grams:
    return Counter(
        tuple(tokens[i : i + order]) for order in range(1, ORDERS + 1) for i in range(len(tokens) - order + 1)
    )


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for token in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if token == other else max(row[j], row[j - 1])
    return row[-1]
