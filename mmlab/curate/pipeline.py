"""MiniGPT-4's curation from pictures to shards; called again, it goes on where it was."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmlab.config.errors import ConfigError, DataError
from mmlab.curate.client import Backend, Client
from mmlab.curate.decisions import decided
from mmlab.curate.journal import Row, by_key, claim, read_rows, write_whole
from mmlab.curate.minigpt4 import Describer, describe, go_on, repair, sift
from mmlab.curate.report import report
from mmlab.curate.rules import check_rules
from mmlab.curate.steps import DATA, REPORT, SHARDS, journal_of, remove_litter, run_step, settle, step_rows
from mmlab.data.formats import EXTENSIONS, IMAGE_EXTENSIONS, Members
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.data.shards import ShardWriter
from mmlab.data.turns import Turn
from mmlab.keyed import draw


class Lazy:
    """A describer that is loaded when it is first needed: a curation that waits for its review needs none.

    Args:
        load: loads it.
        identity: what its descriptions depend on, as plain data: the run, its weights, how it is asked.
    """

    def __init__(self, load: Callable[[], Describer], identity: dict[str, Any]):
        self.identity = identity
        self._load = load

    @cached_property
    def loaded(self) -> Describer:
        return self._load()

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def spec(self) -> ImageSpec:
        return self.loaded.spec

    def __call__(self, dialogues: Sequence[list[Turn]], pictures: Sequence[Tensor | None]) -> list[str]:
        return self.loaded(dialogues, pictures)

    def ask(self, question: str, picture: Tensor | None) -> list[Turn]:
        return self.loaded.ask(question, picture)


@dataclass(frozen=True)
class MiniGPT4:
    """The recipe; its fields are those of `mmlab.config.curate_schema.MiniGPT4Config`, where the numbers come from."""

    samples: int
    seed: int
    instruction: str
    continuation: str
    continue_up_to: int
    repair: str
    rules: Sequence[str]
    batch_size: int = 16
    workers: int = 1
    unrepaired: str = "retry"
    review: str = "all"
    prices: tuple[float | None, float | None] = (None, None)

    def __post_init__(self):
        check_rules(self.rules)


def curate(
    recipe: MiniGPT4, index: ShardIndex, describer: Lazy, backend: Backend, out: Path, quiet: bool = False
) -> dict[str, Any]:
    """Go through the steps as far as they go, and write `out/report.json`.

    Killed at any moment and called again, it ends with the same rows and shards. A reply of the language model is paid
    again only if the process died before the reply had arrived and was written; an empty one is asked for again at
    once, `llm.attempts` times in all, and the last is kept like any other.

    Args:
        recipe: prompts, thresholds, and whom the shards wait for.
        index: the pictures.
        describer: the first stage's model.
        backend: the language model that repairs.
        out: folder, which is made.
        quiet: show no progress.

    Returns:
        The report; its `written` is None as long as a person's decisions are awaited.

    Raises:
        ConfigError: `out` was made with other settings.
        RunError: another process curates into `out`, or descriptions were not repaired.
        DataError: there is no picture, or no description is left.
    """
    with closing(claim(out / ".lock", "curates into")):
        items = _steps(recipe, index, describer, backend, out, quiet)
        decisions = {} if recipe.review == "none" else decided(out, items)
        waits = recipe.review == "all" and len(decisions) < len(items)
        written = None if waits else _write(recipe, index, out, items, decisions)
        counts = report(out, recipe.prices, written)
        write_whole(out / REPORT, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    return counts


def choose(index: ShardIndex, samples: int, seed: int) -> list[int]:
    """Draw samples that have a picture, in the order of the index.

    Raises:
        DataError: none has.
    """
    kinds = [EXTENSIONS.index(name) for name in IMAGE_EXTENSIONS]
    has = np.logical_or.reduceat(np.isin(index.members.extension, kinds), index.members.first[:-1])
    found = np.flatnonzero(has).tolist()
    if not found:
        raise DataError(f"{index.root} holds no picture.")
    return sorted(sorted(found, key=lambda i: draw(seed, str(index.keys[i])))[:samples])


def _steps(recipe: MiniGPT4, index: ShardIndex, describer: Lazy, backend: Backend, out: Path, quiet: bool) -> list[Row]:
    """Steps 1 to 4; what they keep."""
    chosen = choose(index, recipe.samples, recipe.seed)
    rows: list[Row] = [{"key": str(index.keys[i]), "sample": i} for i in chosen]
    settings: dict[str, Any] = {
        **{"data": index.hash, "samples": recipe.samples, "seed": recipe.seed, "chosen": len(chosen)},
        **{**describer.identity, "instruction": recipe.instruction},
    }
    settle(out, "described", settings)  # other pictures are refused before the review would show them
    about_data = json.dumps({"data": str(index.root)}) + "\n"
    if not (out / DATA).exists() or (out / DATA).read_text(encoding="utf-8") != about_data:
        write_whole(out / DATA, about_data)
    ask = Client(backend, out / "replies")
    about = describer, index, recipe.instruction
    more = partial(go_on, continuation=recipe.continuation, up_to=recipe.continue_up_to)
    mend = partial(repair, ask=ask, prompt=recipe.repair, workers=recipe.workers, unrepaired=recipe.unrepaired)

    def step(name: str, do: Any, block: int | None = None, **new: Any) -> list[Row]:
        settings.update(new)
        return run_step(out, name, settings, do, rows, block, quiet)

    rows = step("described", lambda some: describe(some, *about), recipe.batch_size)
    new = {"continuation": recipe.continuation, "continue_up_to": recipe.continue_up_to}
    rows = step("continued", lambda some: more(some, *about), recipe.batch_size, **new)
    rows = step("repaired", mend, repair=recipe.repair, llm=backend.model, llm_settings=backend.settings)
    rows = step("filtered", partial(sift, rules=recipe.rules), rules=list(recipe.rules))
    return [row for row in rows if not row.get("caught") and "fault" not in row]


def _write(
    recipe: MiniGPT4, index: ShardIndex, out: Path, items: Sequence[Row], decisions: dict[str, Row]
) -> dict[str, Any]:
    """Step 6: shards of what was accepted or edited; without a review, of all items."""
    remove_litter(out)
    wanted = [row for row in items if recipe.review == "none" or _accepted(decisions.get(row["key"]))]
    if not wanted:
        raise DataError(f"no description of {out} is left to write: rules caught or a person rejected them all.")
    histories = {name: by_key(step_rows(out, name)) for name in ("described", "continued", "repaired")}
    with ShardWriter(out / SHARDS, overwrite=True, quiet=True) as writer:
        for row in wanted:
            decision = decisions.get(row["key"])
            history = {name: rows[row["key"]] for name, rows in histories.items()}
            writer.write(row["key"], _sample(index, row, decision, history))
    return {"samples": len(wanted), "hash": writer.index.hash}


def _accepted(decision: Row | None) -> bool:
    return decision is not None and decision["action"] != "reject"


def _sample(index: ShardIndex, row: Row, decision: Row | None, history: dict[str, Row]) -> Members:
    """A picture as it was, and its description as the `caption`, with what became of it on the way."""
    repaired = history["repaired"]
    provenance = {
        "recipe": "minigpt4",
        "data": index.hash,
        "described": history["described"]["text"],
        "continued": history["continued"]["text"] if history["continued"]["continued"] else None,
        "repaired": repaired["text"] if repaired["changed"] else None,
        "repaired_by": repaired.get("model"),
        "unrepaired": repaired.get("unrepaired"),
        "review": None if decision is None else decision["action"],
        "reviewed_at": None if decision is None else decision["at"],
    }
    text = row["text"] if decision is None else decision.get("text", row["text"])
    members: Members = dict(index.read(row["sample"], IMAGE_EXTENSIONS))
    return {**members, "json": {"caption": text, "provenance": provenance}}


def data_of(out: Path) -> ShardIndex:
    """The pictures that a curation is about.

    Raises:
        ConfigError: `out` is no curation.
        DataError: the pictures are gone or have changed.
    """
    try:
        root = json.loads((out / DATA).read_text(encoding="utf-8"))["data"]
        settings = read_rows(journal_of(out, "described"))[0]["settings"]
    except (FileNotFoundError, IndexError):
        raise ConfigError(f"There is no curation in {out}; `mmlab curate minigpt4 out={out} …` makes one.") from None
    index = ShardIndex.open(root)
    if index.hash != settings["data"]:
        raise DataError(f"{index.root} is not what it was when {out} was made of it.")
    return index
