"""Ask an exported model about the held-out photos with transformers alone: without_mmlab.py FOLDER DATA JSON OUT.

Of this project it imports nothing but the encoder's class: importing mmlab raises an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class NoMmlab:
    """Makes `import mmlab` fail."""

    def find_spec(self, name: str, path=None, target=None):
        if name.split(".")[0] == "mmlab":
            raise ImportError("mmlab must not be imported here")
        return None


sys.meta_path.insert(0, NoMmlab())  # type: ignore[arg-type]
sys.path.insert(0, str(Path(__file__).parent))

import efficientnet_lite  # noqa: E402, F401  # registers the encoder
from transformers import AutoProcessor, LlavaForConditionalGeneration  # noqa: E402

BATCH = 49


@torch.inference_mode()
def main(folder: str, data: Path, questions: Path, out: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    entries, lines = json.loads(questions.read_text(encoding="utf-8")), []
    for start in range(0, len(entries), BATCH):
        batch = entries[start : start + BATCH]
        texts = [processor.apply_chat_template(messages(entry), add_generation_prompt=True) for entry in batch]
        pictures = [Image.open(data / "grocery-store/dataset" / entry["image"]).convert("RGB") for entry in batch]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt", add_special_tokens=False)
        new = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(new, skip_special_tokens=True)
        lines += [json.dumps({"id": e["id"], "answer": a.strip()}) for e, a in zip(batch, answers, strict=True)]
    assert not [name for name in sys.modules if name.split(".")[0] == "mmlab"]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def messages(entry: dict) -> list[dict]:
    """The first question of an entry in LLaVA's format, as transformers' chat templates take it."""
    question = entry["conversations"][0]["value"].removeprefix("<image>\n")
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
