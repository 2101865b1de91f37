"""A curation in small: pictures that a scripted model describes, badly."""

import io
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from mmlab.curate.decisions import Review
from mmlab.curate.journal import Journal, read_rows
from mmlab.curate.pipeline import Lazy, MiniGPT4, curate
from mmlab.curate.steps import STEPS
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
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
    "a dog and",  # as another picture: its repair is paid for once
]
CONTINUED = ["and a", "", "a ball.", "", "", "It is a dog.", "a ball."]
REPAIRED = {
    "a red star a red star a red star a red star and a": "A red star.",
    "a dog and a ball.": "A dog and a ball.",
    "a cat ###": "A cat ### is here.",
}


def answer(prompt: str) -> str:
    text = prompt.splitlines()[-1]
    return REPAIRED.get(text, text)


class Scripted:
    """Says what `SAID` and `CONTINUED` hold for a picture, which its colour names.

    Attributes:
        batches: the number of pictures in each call.
    """

    spec = ImageSpec(4, "stretch", 1)

    def __init__(self):
        self.batches: list[int] = []

    def tokenizer(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    def ask(self, question: str, picture: Any) -> list[Turn]:
        return [Turn("human", question)]

    def __call__(self, dialogues, pictures) -> list[str]:
        self.batches.append(len(dialogues))
        said = []
        for dialogue, picture in zip(dialogues, pictures, strict=True):
            which = int(picture[0, 0, 0]) // 20
            assert dialogue[0].text == "What is it?"
            assert len(dialogue) == 1 or [t.text for t in dialogue[1:]] == [SAID[which], "Go on"]
            said.append(SAID[which] if len(dialogue) == 1 else CONTINUED[which])
        return said


def colour(which: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (20 * which, 90, 160)).save(file, "PNG")
    return file.getvalue()


def make_pictures(root: Path, count: int = len(SAID)) -> ShardIndex:
    return make_records(root, [{"caption": str(i)} for i in range(count)], [colour(i) for i in range(count)])


def recipe(**changes: Any) -> MiniGPT4:
    rules = ["empty", "repeats", "unfinished", "apology", "symbols"]
    prompts = {"instruction": "What is it?", "continuation": "Go on", "continue_up_to": 10, "repair": "Mend this."}
    few = {"samples": 100, "seed": 0, "rules": rules, "batch_size": 3, "workers": 2, "review": "none"}
    return MiniGPT4(**{**few, **prompts, **changes})


def run(index: ShardIndex, server: ScriptedEndpoint, out: Path, describer=None, **changes: Any) -> dict[str, Any]:
    from mmlab.curate.endpoint import Endpoint

    describer = describer or Scripted()
    backend = Endpoint(server.url, "m", variable=None, timeout=10.0, attempts=2, backoff=0.01)
    return curate(recipe(**changes), index, Lazy(lambda: describer, {"run": "scripted"}), backend, out, quiet=True)


def decide(review: Review, i: int, action: str, text: str = "", seen: int = 0) -> None:
    """Decide about an item as it is now, after the decision `seen`."""
    item = review.item(i)
    review.decide(i, action, text, item["key"], item["proposed"], seen)


def catch(out: Path, key: str) -> None:
    """Make a curation's last step again, with rules that catch a sample."""
    rows = read_rows(out / "filtered.jsonl")
    (out / "filtered.jsonl").unlink()
    with closing(Journal(out / "filtered.jsonl")) as journal:
        for row in rows:
            journal.append({**row, "caught": ["empty"]} if row.get("key") == key else row)


def waiting(root: Path, pairs: Sequence[tuple[str, str]], pictures: Sequence[bytes] | None = None) -> Path:
    """A curation that waits for its review: (as described, as repaired) of each sample."""
    pictures = pictures or [colour(i % 10) for i in range(len(pairs))]
    index = make_records(root / "pictures", [{}] * len(pairs), list(pictures))
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
