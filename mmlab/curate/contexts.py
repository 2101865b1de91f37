"""What a language model is told of a picture that it does not see: its captions, and its objects with their boxes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from mmlab.config.errors import DataError
from mmlab.curate.journal import Row
from mmlab.data.formats import parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.sample import SampleError
from mmlab.keyed import draw


@dataclass(frozen=True)
class Chosen:
    """The questions that a curation asks.

    Attributes:
        rows: `key` (`<sample>-<type>`), `sample` and `type` of each, type after type: a picture that an endpoint does
            not answer is not asked for three times in a row, and questions that begin alike follow on each other.
        contexts: sample → context.
        without_context: how many samples have neither caption nor box.
    """

    rows: list[Row]
    contexts: dict[int, str]
    without_context: int


def context_of(record: Mapping[str, Any]) -> str:
    """Captions, a line each; an empty line; `category: [x1, y1, x2, y2]` of each box, as shares to three places.

    Args:
        record: with `captions` or a `caption`, and `boxes` (`category`, `box`); nothing of it is needed.

    Raises:
        ValueError: boxes that are not of that form.
    """
    listed = record.get("captions")
    captions = listed if isinstance(listed, list) and listed else [record.get("caption")]
    texts = [" ".join(text.split()) for text in captions if isinstance(text, str) and text.strip()]
    boxes = record.get("boxes") or []
    if not isinstance(boxes, list):
        raise ValueError("its boxes are no list")
    lines = [_line(box) for box in boxes]
    return "\n\n".join("\n".join(part) for part in (texts, lines) if part)


def choose(index: ShardIndex, samples: Mapping[str, int], seed: int) -> Chosen:
    """Draw for each type as many of the samples as asked for, or all that have a context.

    Args:
        index: pictures with captions, boxes or both in their records; also without the pictures.
        samples: type → how many.
        seed: of the draw; each type draws for itself.

    Raises:
        DataError: a record or its boxes are malformed, or none has a context.
    """
    contexts: dict[int, str] = {}
    for i in range(len(index)):
        try:
            context = context_of(parse_record(index.read(i, ("json", "txt"))))
        except (ValueError, RecursionError, SampleError) as error:
            reason = str(error).rstrip(".")
            raise DataError(f"sample '{index.keys[i]}' of {index.root} cannot be told: {reason}.") from None
        if context:
            contexts[i] = context
    if not contexts:
        raise DataError(f"{index.root} holds neither captions nor boxes.")
    drawn = {kind: _drawn(index, contexts, kind, count, seed) for kind, count in samples.items()}
    rows = [
        {"key": f"{index.keys[i]}-{kind}", "sample": i, "type": kind}
        for kind, chosen in drawn.items()
        for i in contexts
        if i in chosen
    ]
    return Chosen(rows, contexts, len(index) - len(contexts))


def _drawn(index: ShardIndex, contexts: Mapping[int, str], kind: str, count: int, seed: int) -> set[int]:
    if count >= len(contexts):
        return set(contexts)
    return set(sorted(contexts, key=lambda i: draw(seed, f"{kind}/{index.keys[i]}"))[:count])


def _line(box: Any) -> str:
    category, edges = (box.get("category"), box.get("box")) if isinstance(box, dict) else (None, None)
    if not isinstance(category, str) or not category.strip() or not isinstance(edges, list) or len(edges) != 4:
        raise ValueError(f'a box is not {{"category": text, "box": [x1, y1, x2, y2]}} but {str(box)[:80]}')
    if not all(isinstance(edge, int | float) and isfinite(edge) and 0 <= edge <= 1 for edge in edges):
        raise ValueError(f"box {edges} of '{category}' is not in shares of width and height")
    return f"{' '.join(category.split())}: [{', '.join(str(round(float(edge), 3)) for edge in edges)}]"
