"""A tiny curation of instruction data: images in words, and a scripted language model."""

from pathlib import Path
from typing import Any

from mmlab.curate.client import Client
from mmlab.curate.config import (
    CurateLLaVAInstructConfig,
    InstructDataConfig,
    InstructPromptsConfig,
    InstructSamplesConfig,
)
from mmlab.curate.endpoint import Endpoint
from mmlab.curate.llava_instruct_pipeline import curate
from mmlab.curate.llava_instruct_prompts import load_prompts
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import Script, ScriptedEndpoint, always
from tests.curate.tiny_curation import colour, tiny_endpoint
from tests.tiny_shapes import make_records

THINGS = ("cat", "dog", "cup", "bus", "kite", "sofa")
STEPS, ROWS, PROMPTS = ("answered", "parsed", "filtered"), 9, 9  # of few_images
RULES = ["empty", "unfinished", "caption", "description", "coordinates", "information"]


def make_images(root: Path, things=THINGS, blind: int | None = None) -> ShardIndex:
    """A caption and a box of each thing, or only one of them; `blind` has no image."""
    records = []
    for i, thing in enumerate(things):
        caption = {"captions": [f"A {thing}.", f"The {thing} again."]} if i % 3 != 1 else {}
        box = {"boxes": [{"category": thing, "box": [0.1, 0.25, 0.5, 1]}]} if i % 3 != 2 else {}
        records.append({"image": f"{thing}.jpg", **caption, **box})
    return make_records(root, records, [None if i == blind else colour(i % 10) for i in range(len(things))])


def few_images(root: Path) -> ShardIndex:
    return make_images(root, THINGS[:3])


def words(messages: list[dict[str, str]]) -> str:
    """Response type and context, which identify a question."""
    return f"{messages[0]['content']}\n{messages[-1]['content']}"


def thing_of(prompt: str) -> str:
    return next(thing for thing in THINGS if thing in prompt)


def answer(prompt: str) -> str:
    """A well-formed reply, but the dog's conversation names the caption, and the cup's reasoning has two questions."""
    kind, thing = prompt.split("\n")[0], thing_of(prompt)
    source = " The caption says so." if thing == "dog" else ""
    if kind == "detail_description":
        return f"The photo shows a {thing}.\n\nIt is on the left."
    pair = f"Question:\nWhat does the {thing} do?\n===\nAnswer:\nThe {thing} waits."
    if kind == "complex_reasoning":
        return pair if thing != "cup" else f"{pair}\n===\n{pair}"
    return f"{pair}{source}\n===\nQuestion:\nIs there a hat?\n===\nAnswer:\nNo, there is no hat."


def endpoint(script: Script = always("ok"), say=answer) -> ScriptedEndpoint:  # noqa: B008
    return ScriptedEndpoint(script, answer=say, words=words)


def settings(out: Path, server: ScriptedEndpoint, llm: dict[str, Any] | None = None, **changes: Any):
    """Settings of a curation; `changes` and `llm` are in place of those here."""
    few: Any = {
        "data": InstructDataConfig(path="given"),
        "samples": InstructSamplesConfig(100, 100, 100),
        "prompts": InstructPromptsConfig(*RESPONSE_TYPES),
        "requests": ["What is it?", "Describe it."],
        "rules": RULES,
        **changes,
    }
    return CurateLLaVAInstructConfig(out=str(out), llm=tiny_endpoint(server, **(llm or {})), **few)


def run(index: ShardIndex, server: ScriptedEndpoint, out: Path, few_shot=None, **changes: Any) -> dict[str, Any]:
    config = settings(out, server, **changes)
    client = Client(config.llm, Endpoint(config.llm), out / "replies")
    return curate(config, few_shot or load_prompts(config), index, client, quiet=True)


def adds_up(counts: dict[str, Any]) -> bool:
    """Whether the counts of every step add up, for each type and in total."""
    rows, total = list(counts["types"].values()), counts["total"]
    return (
        all(
            row["chosen"] == row["answered"] + sum(row["unanswered"].values())
            and row["answered"] == row["parsed"] + sum(row["malformed"].values())
            and row["parsed"] == row["kept"] + row["caught"]
            for row in (*rows, total)
        )
        and all(
            total[name] == sum(row[name] for row in rows)
            for name in ("chosen", "answered", "parsed", "caught", "kept", "replies", "prompt_tokens")
        )
        and counts["written"]["entries"] == total["kept"]
        and total["kept"] == counts["written"]["samples"] + counts["written"]["without_picture"]
    )
