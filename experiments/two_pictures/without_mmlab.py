"""Ask an exported model with transformers alone: without_mmlab.py FOLDER SHARDS PREDICTIONS.

Prints the share of the questions in PREDICTIONS to which its answer is the one that `mmlab eval` wrote there.
"""

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH = 60


@torch.inference_mode()
def main(folder: str, shards: str, predictions: str) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with tarfile.open(next(Path(shards).glob("*.tar"))) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    rows = [json.loads(line) for line in Path(predictions).read_text(encoding="utf-8").splitlines()]
    equal = 0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        names = [[f"{row['key']}{end}" for end in (".png", ".0.png")] for row in batch]  # in their order
        shown = [[Image.open(io.BytesIO(files[name])) for name in both if name in files] for both in names]
        chats = [messages(row["question"], len(images)) for row, images in zip(batch, shown, strict=True)]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(new, skip_special_tokens=True)
        equal += sum(answer.strip() == row["prediction"] for row, answer in zip(batch, answers, strict=True))
    print(json.dumps(equal / len(rows)))


def messages(question: str, images: int) -> list[dict]:
    """A chat of one question whose pictures come first."""
    text = question.replace("<image>\n", "")
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


if __name__ == "__main__":
    main(*sys.argv[1:])
