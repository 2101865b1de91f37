"""A tiny curation: images that a scripted model describes badly."""

import io
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from mmlab.curate.client import Client
from mmlab.curate.config import CurateMiniGPT4Config, EndpointConfig
from mmlab.curate.decisions import Review
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.journal import Journal, read_rows
from mmlab.curate.minigpt4_pipeline import curate
from mmlab.data.images import decode_image
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.data.turns import Turn
from tests.curate.scripted_endpoint import ScriptedEndpoint
from tests.tiny_shapes import make_records

SAID = [
    "a red star a red star a red star a red star",
    "The picture shows a blue square on a table, and the blue square is beside a green lamp.",
    "a dog and",
    "a cat ###",
    "",
    "I'm sorry I made a mistake",
    "a dog and",  # as for another image: its repair is billed once
]
CONTINUED = ["and a", "", "a ball.", "", "", "It is a dog.", "a ball."]
REPAIRED = {
    "a red star a red star a red star a red star and a": "A red star.",
    "a dog and a ball.": "A dog and a ball.",
    "a cat ###": "A cat ### is here.",
}


STEPS, ROWS, PROMPTS = ("described", "continued", "repaired", "filtered"), len(SAID), 5


def answer(prompt: str) -> str:
    text = prompt.splitlines()[-1]
    return REPAIRED.get(text, text)


class Scripted:
    """Returns the text of `SAID` or `CONTINUED` at an image's number, which its color encodes.

    Attributes:
        batches: the number of images in each call.
    """

    def decode(self, files: Any) -> list[Any]:
        return [decode_image(data, ImageSpec(4, "stretch")) for data in files]

    def __init__(self):
        self.batches: list[int] = []

    def tokenizer(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def ask(self, question: str, pictures: int) -> list[Turn]:
        return [Turn("human", question)]

    def __call__(self, dialogues, images) -> list[str]:
        self.batches.append(len(dialogues))
        said = []
        for dialogue, image in zip(dialogues, images, strict=True):
            which = int(image[0][0, 0, 0]) // 20
            assert dialogue[0].text == "What is it?"
            assert len(dialogue) == 1 or [t.text for t in dialogue[1:]] == [SAID[which], "Go on"]
            said.append(SAID[which] if len(dialogue) == 1 else CONTINUED[which])
        return said


def colour(which: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (20 * which, 90, 160)).save(file, "PNG")
    return file.getvalue()


def make_images(root: Path, count: int = len(SAID)) -> ShardIndex:
    return make_records(root, [{"caption": str(i)} for i in range(count)], [colour(i) for i in range(count)])


def few_images(root: Path) -> ShardIndex:
    return make_images(root)


def endpoint() -> ScriptedEndpoint:
    return ScriptedEndpoint(answer=answer)


def records(out: Path) -> dict[str, dict[str, Any]]:
    """key → record of the shards that a curation has written."""
    shards = ShardIndex.open(out / "shards")
    return {str(shards.keys[i]): json.loads(shards.read(i)["json"]) for i in range(len(shards))}


def run(
    index: ShardIndex, server: ScriptedEndpoint, out: Path, describer=None, llm: dict[str, Any] | None = None, **changes
) -> dict[str, Any]:
    """Curate with few-pixel images; `changes` and `llm` are settings in place of those here."""
    rules = ["empty", "repeats", "unfinished", "apology", "symbols"]
    prompts = {"instruction": "What is it?", "continuation": "Go on", "continue_up_to": 10, "repair": "Mend this."}
    settings: Any = {"samples": 100, "rules": rules, "batch_size": 3, "review": "none", **prompts, **changes}
    config = CurateMiniGPT4Config(out=str(out), llm=tiny_endpoint(server, **(llm or {})), **settings)
    client = Client(config.llm, Endpoint(config.llm), out / "replies")
    return curate(config, index, lambda: describer or Scripted(), {"run": "scripted"}, client, quiet=True)


def tiny_endpoint(server: ScriptedEndpoint, **changes: Any) -> EndpointConfig:
    quick: Any = {"timeout": 10.0, "attempts": 2, "backoff": 0.01, "workers": 2, "settings": {}, **changes}
    return EndpointConfig(url=server.url, model="m", variable=None, **quick)


def decide(review: Review, i: int, action: str, text: str = "", seen: int = 0) -> None:
    """Decide about an item in its current state, after the decision `seen`."""
    item = review.item(i)
    review.decide(i, action, text, item["key"], item["proposed"], seen)


def catch(out: Path, key: str) -> None:
    """Rewrite a curation's last step as if rules caught a sample."""
    rows = read_rows(out / "filtered.jsonl")
    (out / "filtered.jsonl").unlink()
    with closing(Journal(out / "filtered.jsonl")) as journal:
        for row in rows:
            journal.append({**row, "caught": ["empty"]} if row.get("key") == key else row)


def waiting(root: Path, pairs: Sequence[tuple[str, str]], images: Sequence[bytes] | None = None) -> Path:
    """A curation that waits for its review, from (described, repaired) texts."""
    images = images or [colour(i % 10) for i in range(len(pairs))]
    index = make_records(root / "pictures", [{}] * len(pairs), list(images))
    out = root / "out"
    out.mkdir()
    (out / "data.json").write_text(json.dumps({"data": str(index.root)}))
    for name in STEPS:
        journal = Journal(out / f"{name}.jsonl")
        journal.append({"settings": {"chosen": len(pairs), "data": index.hash}})
        for i, (described, repaired) in enumerate(pairs):
            text = described if name in STEPS[:2] else repaired
            journal.append({"key": f"s{i:04d}", "sample": i, "text": text, "caught": []})
        journal.close()
    return out
