"""Classes of images by the most similar of their names as texts (CLIP, section 3.1). Legend: N images, K classes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from mmlab.class_names import class_index
from mmlab.config.errors import ConfigError, nearest
from mmlab.data.class_texts import class_text
from mmlab.data.sample_types import SampleError
from mmlab.evaluate.image_text import Distinct, PairEncoder, similarity
from mmlab.report.contact_sheet import FAINT, INK, PAGE, font

TOP = 5
BATCH = 64
"""Texts of classes that are encoded at a time."""
DRAWN = 40
"""Most classes of a confusion table."""


def classes_of(distinct: Distinct, names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The classes in their order, and the images that have one of them.

    Args:
        distinct: the images.
        names: the classes, in the order of their numbers; empty: those that the images have, sorted.

    Raises:
        ConfigError: an image of another class.
    """
    labeled = [n for n, name in enumerate(distinct.classes) if name is not None]
    if not names:
        return sorted({str(distinct.classes[n]) for n in labeled}), labeled
    for name in {str(distinct.classes[n]) for n in labeled}:
        try:
            class_index(name, names)
        except ValueError as error:
            raise ConfigError(f"classes: {error}{nearest(name, names)}") from error
    return list(names), labeled


def class_vectors(encoder: PairEncoder, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """A vector of each class, float32 `[K, E]`: the normalized mean over the prompts (CLIP, section 3.1.4).

    Raises:
        ConfigError: a text that the model cannot read.
    """
    texts = [class_text(prompt, name) for name in names for prompt in prompts]
    try:
        tokens = [encoder.tokens(text) for text in texts]
    except SampleError as error:
        raise ConfigError(f"class_prompts={prompts[0]!r}: a class cannot be read as text: {error}") from error
    vectors = encoder.texts(tokens, BATCH)
    return F.normalize(vectors.view(len(names), len(prompts), -1).mean(1), dim=-1)


def zero_shot(distinct: Distinct, names: Sequence[str], labeled: Sequence[int], vectors_KE: Tensor) -> dict[str, Any]:
    """Classify images.

    Args:
        distinct: images, with their classes.
        names: of the classes.
        labeled: the images that have one of them.
        vectors_KE: of the classes.

    Returns:
        `images`, `classes`; `top1`, `top5` (None for at most five classes), and `mean_per_class`, the mean of the
        classes' `top1`; the same of `chance`, and of `majority`, which always says the commonest classes; `per_class`;
        `confusion`: rows of right classes, columns of predicted ones; `predicted`: of each of `labeled`. Of classes
        that are equally similar the right one counts as the last, so that a model that gives all the same vector is
        never right.
    """
    labels = torch.tensor([class_index(distinct.classes[n], names) for n in labeled])
    rows = torch.as_tensor(labeled, device=distinct.images_NQE.device)
    similar = similarity(distinct.images_NQE[rows], vectors_KE).cpu()
    own = similar.gather(1, labels[:, None])
    ranks = (similar >= own).sum(1)  # 1 for the nearest: a class is as similar as itself
    predicted = torch.where(ranks == 1, labels, similar.scatter(1, labels[:, None], -torch.inf).argmax(1))
    counts = Counter(labels.tolist())
    commonest = [label for label, _ in counts.most_common(TOP)]
    first = (labels == commonest[0]).double()
    among = torch.isin(labels, torch.tensor(commonest)).double()
    few = len(names) <= TOP
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    per_class = {}
    for label, name in enumerate(names):
        mine = ranks[labels == label]
        wrong = confusion[label].clone()
        wrong[label] = 0
        per_class[name] = {
            "images": len(mine),
            **(_shares(mine, few) if len(mine) else {"top1": None, "top5": None}),
            "mistaken_for": names[int(wrong.argmax())] if wrong.any() else None,
        }
    seen = [row["top1"] for row in per_class.values() if row["images"]]
    return {
        "images": len(labeled),
        "classes": len(names),
        **_shares(ranks, few),
        "mean_per_class": sum(seen) / len(seen),
        "chance": {"top1": 1 / len(names), "top5": None if few else TOP / len(names), "mean_per_class": 1 / len(names)},
        "majority": {
            "top1": float(first.mean()),
            "top5": None if few else float(among.mean()),
            "mean_per_class": 1 / len(seen),
            "class": names[commonest[0]],
        },
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "predicted": [names[label] for label in predicted.tolist()],
    }


def _shares(ranks: Tensor, few: bool) -> dict[str, float | None]:
    top5 = None if few else float((ranks <= TOP).double().mean())
    return {"top1": float((ranks == 1).double().mean()), "top5": top5}


def zero_shot_table(scores: Mapping[str, Any]) -> str:
    """The scores with their baselines, and each class, the worst first."""
    width = max(20, *(len(name) + 2 for name in scores["per_class"]))
    lines = [f"{'':<{width}}{'images':>10}{'top-1':>10}{'top-5':>10}{'mean per class':>16}"]
    for title, row in (("all", scores), ("  chance", scores["chance"]), ("  majority", scores["majority"])):
        images = f"{scores['images']:,}" if row is scores else ""
        lines.append(f"{title:<{width}}{images:>10}{_percent(row)}{row['mean_per_class']:>16.2%}")
    rows = [(name, row) for name, row in scores["per_class"].items() if row["images"]]
    for name, row in sorted(rows, key=lambda pair: pair[1]["top1"]):
        mistaken = f"   mostly mistaken for {row['mistaken_for']}" if row["mistaken_for"] else ""
        lines.append(f"{name:<{width}}{row['images']:>10,}{_percent(row)}{mistaken}")
    return "\n".join(lines)


def _percent(row: Mapping[str, Any]) -> str:
    return "".join(f"{'-' if row[name] is None else format(row[name], '.2%'):>10}" for name in ("top1", "top5"))


def confusion_sheet(scores: Mapping[str, Any], title: str) -> Image.Image:
    """The table of right classes (rows) and predicted ones (columns), as shares of a row.

    Of more than `DRAWN` classes, those with the most wrong images are drawn.
    """
    names, counts = list(scores["per_class"]), np.array(scores["confusion"])
    shown = np.arange(len(names))
    if len(names) > DRAWN:
        shown = np.sort(np.argsort(np.diag(counts) - counts.sum(1), kind="stable")[:DRAWN])
        title = f"{title}; {DRAWN} of {len(names)} classes"
    shares = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[np.ix_(shown, shown)]
    face, cell, margin = font(13), 34, 24
    labels = [_shortened(names[n]) for n in shown]
    left = margin + 12 + max(int(face.getlength(label)) for label in labels)
    top, side = 76 + left - margin, cell * len(shown)
    width = max(left + side + margin, int(font(20).getlength(title)) + 2 * margin)
    sheet = Image.new("RGB", (width, top + side + margin), PAGE)
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, 20), title, font=font(20), fill=INK)
    pen.text((margin, 48), "rows: right class; columns: predicted class; percent of a row", font=face, fill=FAINT)
    for n, label in enumerate(labels):
        middle = top + n * cell + cell // 2
        pen.text((left - 8, middle), label, font=face, fill=INK, anchor="rm")
        upright = Image.new("RGB", (int(face.getlength(label)) + 2, 18), PAGE)
        ImageDraw.Draw(upright).text((0, 9), label, font=face, fill=INK, anchor="lm")
        turned = upright.rotate(90, expand=True)
        sheet.paste(turned, (left + n * cell + (cell - turned.width) // 2, top - 6 - turned.height))
        for m, value in enumerate(shares[n]):
            corner = (left + m * cell, top + n * cell)
            pen.rectangle((*corner, corner[0] + cell - 2, corner[1] + cell - 2), fill=_ink(float(value), n == m))
            if value >= 0.005:
                center = (corner[0] + cell // 2, corner[1] + cell // 2)
                pen.text(center, f"{100 * value:.0f}", font=face, fill="#ffffff" if value > 0.5 else INK, anchor="mm")
    return sheet


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _ink(value: float, right: bool) -> tuple[int, int, int]:
    """White to green for right images, white to red for wrong ones."""
    full = (46, 125, 50) if right else (198, 40, 40)
    return tuple(round(255 + (channel - 255) * value) for channel in full)  # type: ignore[return-value]
