"""Score what the models said, draw the sheet, and print the figures of one run of run.sh: figures.py DATA SECONDS."""

import json
import sys
from pathlib import Path
from typing import Any

import groceries
import texts

STAGES = {"align": "stage 1", "lora": "LoRA", "full": "full"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(stage: str, questions: str) -> list[str]:
    """What the model said after a stage, in the order of the questions."""
    return [line["prediction"] for line in read_lines(Path("eval", stage, questions, "predictions.jsonl"))]


def text_answers(stage: str) -> dict[str, str]:
    return {line["question"]: line["prediction"] for line in read_lines(Path("eval", stage, "text/predictions.jsonl"))}


def coarse_correct(answers: list[str], photos: list[groceries.Photo], names: dict[str, str]) -> float:
    rights = [groceries.is_right(answer, photo.coarse, names) for answer, photo in zip(answers, photos, strict=True)]
    return sum(rights) / len(rights)


def same_words() -> float:
    """Share of held-out photos of which transformers alone says the same as mmlab."""
    alone = [line["answer"] for line in read_lines(Path("eval/lora/without_mmlab.jsonl"))]
    pairs = list(zip(alone, said("lora", "photos"), strict=True))
    return sum(one == other for one, other in pairs) / len(pairs)


def sheet(root: Path, photos: list[groceries.Photo], answers: dict[str, list[str]], names: dict[str, str]) -> None:
    """Draw every 13th held-out photo with what the model says about it after each stage."""
    from PIL import Image

    from mmlab.report.contact_sheet import BAD, GOOD, contact_sheet

    chosen = range(3, len(photos), 13)
    pictures = [Image.open(root / "grocery-store/dataset" / photos[n].path).convert("RGB") for n in chosen]
    notes = ["\n".join(f"{STAGES[stage]}: {answers[stage][n]}" for stage in answers) for n in chosen]
    colors = [GOOD if groceries.is_right(answers["full"][n], photos[n].coarse, names) else BAD for n in chosen]
    labels = [groceries.fine_words(photos[n].fine, photos[n].coarse) for n in chosen]
    drawn = contact_sheet(pictures, notes, 5, colors, labels, cell=192, title="What is this?")
    drawn.quantize(128).save("sheet.png")


def main(root: Path, seconds: int) -> None:
    dataset = root / "grocery-store/dataset"
    photos = groceries.read_photos(dataset, "val")
    names = groceries.lexicon([*photos, *groceries.read_photos(dataset, "train")])
    answers = {stage: said(stage, "photos") for stage in STAGES}
    sheet(root, photos, answers, names)
    before = text_answers("align")  # the language model is frozen in stage 1
    asked = texts.chosen(before)
    probe = json.loads(Path("probe.json").read_text())
    steps = read_lines(Path("steps.jsonl"))
    figures: dict[str, Any] = {"probe": probe["probe"], "imagenet_top1": probe["top1"]}
    figures["coarse_correct"] = {stage: coarse_correct(answers[stage], photos, names) for stage in STAGES}
    figures["easy_vqa_accuracy"] = {}
    for stage in ("lora", "full"):
        scores = json.loads(Path("eval", stage, "easy/scores.json").read_text())
        figures["easy_vqa_accuracy"][stage] = scores["accuracy"]
        figures["easy_vqa_accuracy"]["question_only"] = scores["question_only"]["accuracy"]
    figures["text_kept"] = {"before": len(asked)}
    for stage in ("lora", "full"):
        after = text_answers(stage)
        figures["text_kept"][stage] = sum(texts.answers_right(question, after[question]) for question in asked)
    figures["export_same_words"] = same_words()
    figures["minutes"] = seconds / 60
    figures["minutes_of_steps"] = {line["step"]: line["minutes"] for line in steps}
    figures["peak_memory_gib"] = max(line["peak_memory_gib"] for line in steps)
    figures["peak_memory_gib_of_steps"] = {line["step"]: line["peak_memory_gib"] for line in steps}
    print(json.dumps(rounded(figures)))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
