"""A curation of instruction data in small: pictures told in words, and a language model that follows a script."""

from pathlib import Path
from typing import Any

from mmlab.curate.endpoint import Endpoint
from mmlab.curate.instruct_pipeline import LLaVAInstruct, curate
from mmlab.data.formats import RESPONSE_TYPES
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import Script, ScriptedEndpoint, always
from tests.curate.tiny_curation import colour
from tests.tiny_shapes import make_records

THINGS = ("cat", "dog", "cup", "bus", "kite", "sofa")
RULES = ["empty", "unfinished", "caption", "description", "coordinates", "information"]


def make_pictures(root: Path, things=THINGS, blind: int | None = None) -> ShardIndex:
    """A caption and a box of each thing, in turn with either alone; `blind` has no picture."""
    records = []
    for i, thing in enumerate(things):
        caption = {"captions": [f"A {thing}.", f"The {thing} again."]} if i % 3 != 1 else {}
        box = {"boxes": [{"category": thing, "box": [0.1, 0.25, 0.5, 1]}]} if i % 3 != 2 else {}
        records.append({"image": f"{thing}.jpg", **caption, **box})
    return make_records(root, records, [None if i == blind else colour(i % 10) for i in range(len(things))])


def words(messages: list[dict[str, str]]) -> str:
    """A prompt by which questions are told apart: response type and context."""
    return f"{messages[0]['content']}\n{messages[-1]['content']}"


def thing_of(prompt: str) -> str:
    return next(thing for thing in THINGS if thing in prompt)


def answer(prompt: str) -> str:
    """A reply of the right form; the dog's talk names the caption, the cup's reasoning has two questions."""
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


def recipe(**changes: Any) -> LLaVAInstruct:
    few = {
        "samples": dict.fromkeys(RESPONSE_TYPES, 100),
        "prompts": {kind: kind for kind in RESPONSE_TYPES},
        "rules": RULES,
    }
    return LLaVAInstruct(**{**few, "requests": ["What is it?", "Describe it."], "workers": 2, **changes})


def run(
    index: ShardIndex, server: ScriptedEndpoint, out: Path, timeout: float = 10.0, **changes: Any
) -> dict[str, Any]:
    backend = Endpoint(server.url, "m", variable=None, timeout=timeout, attempts=2, backoff=0.01)
    return curate(recipe(**changes), index, backend, out, quiet=True)


def adds_up(counts: dict[str, Any]) -> bool:
    """Whether nothing was lost or made up between the steps, in each type and over all."""
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
