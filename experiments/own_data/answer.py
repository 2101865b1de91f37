"""Ask the exported model a few questions with transformers alone: answer.py EXPORTED TEST_JSON IMAGES."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, records, images = map(Path, sys.argv[1:])
model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
for record in [one for one in json.loads(records.read_text()) if one["type"] != "caption"][:5]:
    question, answer = (turn["value"].removeprefix("<image>\n") for turn in record["conversations"][:2])
    content = [{"type": "image", "image": Image.open(images / record["image"])}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    # In one call: tokenizing the text of a prompt would add a second beginning of text.
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        reply = model.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
    print(f"{question} {processor.decode(reply, skip_special_tokens=True).strip()} (right: {answer})")
