"""Retrieval of texts by images, and of images by texts. Legend: N images, M texts, Q vectors of an image, E width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmlab.evaluate.image_text import Distinct, similarity
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.report.contact_sheet import BAD, GOOD, contact_sheet

AT = (1, 5, 10)
"""Ranks at which recall is measured (CLIP, table 13; BLIP, table 5)."""
CHUNK = 1 << 24
"""Similarities that are computed at a time; 64 MB in float32."""
SHOWN = 5
"""Nearest texts that are kept of each image, and nearest images of each text."""


@dataclass(frozen=True)
class Direction:
    """What each query finds in a gallery.

    Attributes:
        ranks: int64 `[queries]`, of the first right one, from 1. A wrong one that is as similar counts as nearer, so
            that a model that gives all the same vector finds nothing.
        nearest: int64 `[queries, SHOWN]` or fewer, the nearest of the gallery.
        scores: their similarities.
        chances: probability of each query to find a right one among the first k of a shuffled gallery, by k.
    """

    ranks: Tensor
    nearest: Tensor
    scores: Tensor
    chances: dict[int, Tensor]

    def as_json(self, weights: Tensor | None = None) -> dict[str, Any]:
        """`r@1`, `r@5`, `r@10`, `median_rank`, and `chance` with the first three; in the mean over weighted queries."""
        weights = torch.ones(len(self.ranks)) if weights is None else weights.float()
        share = weights.double() / weights.sum()
        recalls = {f"r@{k}": float((self.ranks <= k).double() @ share) for k in AT}
        order = self.ranks.argsort()
        middle = int((share[order].cumsum(0) >= 0.5).nonzero()[0])
        chance = {f"r@{k}": float(self.chances[k].double() @ share) for k in AT}
        return {**recalls, "median_rank": int(self.ranks[order[middle]]), "chance": chance}


def directions(distinct: Distinct, texts_ME: Tensor) -> tuple[Direction, Direction]:
    """Image → text, for each image with a caption (in the order of `queries_of`), and text → image.

    Args:
        distinct: images and texts, with at least one pair.
        texts_ME: vectors of the texts.
    """
    by_image: dict[int, list[int]] = {}
    by_text: dict[int, list[int]] = {}
    for image, text in distinct.pairs:
        by_image.setdefault(image, []).append(text)
        by_text.setdefault(text, []).append(image)
    images_NQE = distinct.images_NQE
    rows = torch.tensor(queries_of(distinct), device=images_NQE.device)

    def of_images(part: slice) -> Tensor:
        return similarity(images_NQE[rows[part]], texts_ME)

    def of_texts(part: slice) -> Tensor:
        return similarity(images_NQE, texts_ME[part]).T

    found = _search(of_images, [by_image[n] for n in rows.tolist()], len(texts_ME), images_NQE.shape[1])
    return found, _search(of_texts, [by_text[m] for m in range(len(texts_ME))], len(images_NQE), images_NQE.shape[1])


def queries_of(distinct: Distinct) -> list[int]:
    """The images that have a caption, in order."""
    return sorted({image for image, _ in distinct.pairs})


def _search(similar: Any, right: Sequence[Sequence[int]], gallery: int, vectors: int) -> Direction:
    """Rank a gallery for every query, some queries at a time.

    Args:
        similar: slice of queries → similarities `[queries, gallery]`.
        right: the right ones of each query, at least one.
        gallery: number of things to find.
        vectors: Q, which the memory of a similarity grows with.
    """
    ranks, nearest, scores = [], [], []
    step = max(1, CHUNK // (gallery * vectors))
    for start in range(0, len(right), step):
        part = slice(start, min(start + step, len(right)))
        values = similar(part)
        is_right = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
        for row, places in enumerate(right[part]):
            is_right[row, torch.as_tensor(places, device=values.device)] = True
        best = values.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + ((values >= best) & ~is_right).sum(1).cpu())
        top = values.topk(min(SHOWN, gallery), dim=1)
        nearest.append(top.indices.cpu())
        scores.append(top.values.float().cpu())
    chances = {k: torch.tensor([chance(len(places), gallery, k) for places in right]) for k in AT}
    return Direction(torch.cat(ranks), torch.cat(nearest), torch.cat(scores), chances)


def chance(right: int, gallery: int, k: int) -> float:
    """Probability that one of `right` things is among the first k of a shuffled gallery."""
    return 1 - comb(gallery - right, k) / comb(gallery, k) if k < gallery else 1.0


def retrieval_scores(distinct: Distinct, found: tuple[Direction, Direction]) -> dict[str, Any]:
    """Scores of both directions; every caption is a query, equal ones each count."""
    counts = torch.zeros(len(distinct.texts))
    for (_, text), count in distinct.pairs.items():
        counts[text] += count
    numbers = {"images": len(distinct.places), "captions": distinct.captions, "distinct_captions": len(distinct.texts)}
    return {**numbers, "image_to_text": found[0].as_json(), "text_to_image": found[1].as_json(counts)}


def retrieval_table(scores: Mapping[str, Any]) -> str:
    """Both directions with chance, as text."""
    names = [f"r@{k}" for k in AT]
    lines = [f"{'':<16}" + "".join(f"{name.upper():>10}" for name in names) + f"{'median rank':>14}"]
    for direction in ("image_to_text", "text_to_image"):
        row = scores[direction]
        cells = "".join(f"{row[name]:>10.2%}" for name in names)
        lines.append(f"{direction.replace('_', ' '):<16}{cells}{row['median_rank']:>14,}")
        lines.append(f"{'  chance':<16}" + "".join(f"{row['chance'][name]:>10.2%}" for name in names))
    return "\n".join(lines)


def text_sheet(pictures: PictureSet, distinct: Distinct, found: Direction, title: str, cells: int = 24) -> Image.Image:
    """Images spread over the set with the texts nearest to them; green if the first one is right."""
    queries = queries_of(distinct)
    chosen = _spread(len(queries), cells)
    lines = []
    for n in chosen:
        near = found.nearest[n, :3].tolist()
        marks = ["+" if (queries[n], text) in distinct.pairs else "-" for text in near]
        texts = [f"{mark} {distinct.texts[text][:80]}" for mark, text in zip(marks, near, strict=True)]
        lines.append("\n".join([*texts, f"first right text: {int(found.ranks[n]):,}"]))
    return contact_sheet(
        [pictures.picture(distinct.places[queries[n]]) for n in chosen],
        lines,
        columns=6,
        colors=[GOOD if found.ranks[n] == 1 else BAD for n in chosen],
        labels=[pictures.key(distinct.places[queries[n]]) for n in chosen],
        title=title,
        max_lines=10,
    )


def image_sheet(pictures: PictureSet, distinct: Distinct, found: Direction, title: str, rows: int = 8) -> Image.Image:
    """Texts spread over the set, each with a row of the images nearest to it; right ones are green."""
    shown, lines, colors, labels = [], [], [], []
    columns = found.nearest.shape[1]
    for text in _spread(len(distinct.texts), rows):
        for column, image in enumerate(found.nearest[text].tolist()):
            right = (image, text) in distinct.pairs
            shown.append(pictures.picture(distinct.places[image]))
            lines.append(f"{distinct.texts[text][:80] if column == 0 else ''}\n{'right' if right else 'wrong'}".strip())
            colors.append(GOOD if right else BAD)
            labels.append(f"{column + 1}: {float(found.scores[text, column]):.3f}")
    return contact_sheet(shown, lines, columns, colors, labels, title, cell=160, max_lines=5)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spread."""
    return [n * count // min(count, most) for n in range(min(count, most))]
