"""What `mmlab eval` scores of a model that compares images and texts: retrieval, and classes by their names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from mmlab.config.errors import DataError
from mmlab.data.class_texts import check_prompt
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.image_text import Distinct, PairEncoder, read_distinct
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.retrieval import directions, image_sheet, queries_of, retrieval_scores, retrieval_table, text_sheet
from mmlab.evaluate.scores.score_table import write_scores
from mmlab.evaluate.zero_shot import class_vectors, classes_of, confusion_sheet, zero_shot, zero_shot_table
from mmlab.runs.disk import replacing, write_lines
from mmlab.stage.assembly import restore
from mmlab.training.trainer import place

PROMPT = "a photo of a {}."
"""CLIP's default (section 3.1.4)."""


def score_matching(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Find the captions of images and the images of captions, and classify images by the names of their classes."""
    prompts = list(cfg.class_prompts) or [trained.stage.get("class_prompt") or PROMPT]
    for prompt in prompts:
        check_prompt(prompt, "class_prompts")
    # Opened before the model is loaded, so that a wrong path costs no time.
    pictures = PictureSet(cfg.data.path, ImageSpec(1), cfg.limit, cfg.data.bad_budget)
    data: Any = OmegaConf.to_object(trained.data)
    encoder = PairEncoder(place(restore(folder)[0], cfg.trainer), data)
    pictures.spec = encoder.spec
    result = _Matching(encoder, pictures, read_distinct(pictures, encoder, cfg.batch_size))
    reasons = list(filter(None, [result.retrieve(cfg.batch_size), result.classify(list(cfg.classes), prompts)]))
    if not result.scores:
        raise DataError(f"{pictures.index.root} has nothing to score: {'; '.join(reasons)}.")
    distinct = result.distinct
    about = {"run": folder.name, "samples": distinct.samples, "pictures": pictures.describe()}
    write_scores(out, {**about, **result.scores, "bad_samples": pictures.bad.as_json()})
    write_lines(out / "predictions.jsonl", result.rows)
    for name, sheet in result.sheets.items():
        with replacing(out / f"{name}.png") as draft:
            sheet.save(draft)
    if merged := distinct.samples - len(distinct.places):
        reasons.append(f"{merged:,} of {distinct.samples:,} images equal another one, and count as one with it")
    for reason in [*reasons, *([f"{pictures.bad.root}: {pictures.bad}"] if pictures.bad else [])]:
        print(reason)
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in result.sheets)}")


@dataclass
class _Matching:
    """The scores, sheets, and lines of predictions.jsonl (one for each image) of one evaluation."""

    encoder: PairEncoder
    pictures: PictureSet
    distinct: Distinct
    scores: dict[str, Any] = field(default_factory=dict)
    sheets: dict[str, Image.Image] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        images = zip(self.distinct.places, self.distinct.classes, strict=True)
        self.rows = [{"key": self.pictures.key(place), "class": name} for place, name in images]

    def retrieve(self, batch_size: int) -> str | None:
        """Score retrieval; return why there is none to score."""
        distinct, name = self.distinct, self.pictures.index.root.name
        if min(len(distinct.texts), len(distinct.places)) < 2:
            has = f"{len(distinct.places):,} different images and {len(distinct.texts):,} different captions"
            return f"no retrieval, which needs two of each: there are {has}"
        found = directions(distinct, self.encoder.texts(distinct.tokens, batch_size))
        self.scores["retrieval"] = scores = retrieval_scores(distinct, found)
        print(retrieval_table(scores))
        for key, draw, one in zip(("image_to_text", "text_to_image"), (text_sheet, image_sheet), found, strict=True):
            recall, chance = scores[key]["r@1"], scores[key]["chance"]["r@1"]
            title = f"{name}: R@1 {recall:.1%} {key.replace('_', ' ')} (chance {chance:.1%})"
            self.sheets[f"retrieved_{key.split('_')[-1]}s"] = draw(self.pictures, distinct, one, title)
        for n, image in enumerate(queries_of(distinct)):
            near = [distinct.texts[text] for text in found[0].nearest[n].tolist()]
            self.rows[image] |= {"rank": int(found[0].ranks[n]), "texts": near}
        return None

    def classify(self, classes: list[str], prompts: list[str]) -> str | None:
        """Score the classes, if images have one; return why there is nothing to tell apart."""
        names, labeled = classes_of(self.distinct, classes)
        if not labeled:
            return "no classes to tell apart: no image has one" if classes or not self.scores else None
        if len(names) < 2:
            return f"no classes to tell apart: all are '{names[0]}'"
        if not classes and all(name.isdecimal() for name in names):
            numbers = ",".join(names[:2]) + ",…" * (len(names) > 2)
            given = f"classes=[cat,dog] (or classes=[{numbers}] if these are the names)"
            return f"no classes to tell apart by name: {names[0]} is a number; name them in order, {given}"
        result = zero_shot(self.distinct, names, labeled, class_vectors(self.encoder, names, prompts))
        for image, name in zip(labeled, result.pop("predicted"), strict=True):
            self.rows[image]["predicted"] = name
        self.scores["zero_shot"] = {"prompts": prompts, **result}
        print(zero_shot_table(result))
        title = f"{self.pictures.index.root.name}: top-1 {result['top1']:.1%} of {result['images']:,} images"
        title += f" (commonest class {result['majority']['top1']:.1%})"
        self.sheets["confusion"] = confusion_sheet(result, title)
        return None
