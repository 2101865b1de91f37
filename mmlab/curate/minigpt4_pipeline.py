"""MiniGPT-4's curation from images to shards; the same command resumes it."""

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from mmlab.config.errors import ConfigError, DataError
from mmlab.curate.client import Client
from mmlab.curate.config import CurateMiniGPT4Config
from mmlab.curate.curation_report import minigpt4_report
from mmlab.curate.decisions import decided
from mmlab.curate.journal import (
    REPORT,
    SHARDS,
    Row,
    Steps,
    by_key,
    exclusive,
    journal_of,
    open_journal,
    read_rows,
    step_rows,
)
from mmlab.curate.minigpt4_steps import Describer, continue_short, describe, repair, sift
from mmlab.data.formats import EXTENSIONS, IMAGE_EXTENSIONS, Members
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from mmlab.keyed import draw
from mmlab.runs.disk import to_json, write_text

DATA = "data.json"


def curate(
    config: CurateMiniGPT4Config,
    index: ShardIndex,
    load_describer: Callable[[], Describer],
    identity: Mapping[str, Any],
    client: Client,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the steps as far as possible, and write `report.json` into `config.out`.

    Killed at any moment and called again, it ends with the same rows and shards. A reply is billed again only if the
    process was killed before the reply was on disk; an empty one is requested up to `llm.attempts` times, and the last
    one is stored like any other.

    Args:
        config: settings.
        index: the images.
        load_describer: loads the first stage's model; not called if there is nothing to describe.
        identity: plain data on which its descriptions depend: the run, its weights, its prompt.
        client: asks the language model that repairs.
        quiet: show no progress.

    Returns:
        The report; its `written` is None while the shards wait for decisions.

    Raises:
        ConfigError: the folder was made with other settings.
        RunError: another process curates into the folder, or descriptions were not repaired.
        DataError: there is no image, or no description is left.
    """
    out = Path(config.out)
    with exclusive(out):
        items = _steps(config, index, cache(load_describer), identity, client, quiet)
        decisions = {} if config.review == "none" else decided(out, items)
        waits = config.review == "all" and len(decisions) < len(items)
        written = None if waits else _write(config, index, out, items, decisions)
        report = minigpt4_report(out, config.llm, written)
        write_text(out / REPORT, to_json(report, indent=1, ensure_ascii=False) + "\n")
    return report


def draw_images(index: ShardIndex, samples: int, seed: int) -> list[int]:
    """Draw samples that have an image; returns their places in order.

    Raises:
        DataError: no sample has one.
    """
    with_image = ((draw(seed, key), i) for i, key in _keys_with_image(index))
    drawn = sorted(i for _, i in heapq.nsmallest(samples, with_image))
    if not drawn:
        raise DataError(f"{index.root} contains no image.")
    return drawn


def _keys_with_image(index: ShardIndex) -> Iterator[tuple[int, str]]:
    """Place and key of each sample with an image."""
    codes = [EXTENSIONS.index(name) for name in IMAGE_EXTENSIONS]
    for shard, table in enumerate(index.tables()):
        images = np.concatenate([[0], np.cumsum(np.isin(table.extension, codes))])
        for j in np.flatnonzero(np.diff(images[table.first])).tolist():
            yield index.first(shard) + j, table.key(j)


def _steps(
    config: CurateMiniGPT4Config,
    index: ShardIndex,
    describer: Callable[[], Describer],
    identity: Mapping[str, Any],
    client: Client,
    quiet: bool,
) -> list[Row]:
    """Steps 1 to 4; the rows that no rule catches."""
    out = Path(config.out)
    chosen = draw_images(index, config.samples, config.seed)
    settings = {"data": index.hash, "samples": config.samples, "seed": config.seed, "chosen": len(chosen)}
    settings |= {**identity, "instruction": config.instruction}
    open_journal(out, "described", settings)  # refuses other images before the review would show them
    data = to_json({"data": str(index.root)}) + "\n"
    if not (out / DATA).exists() or (out / DATA).read_text(encoding="utf-8") != data:
        write_text(out / DATA, data)

    def describe_batch(rows: Sequence[Row]):
        return describe(rows, describer(), index, config.instruction)

    def continue_batch(rows: Sequence[Row]):
        prompts = config.instruction, config.continuation
        return continue_short(rows, describer(), index, *prompts, config.continue_up_to)

    steps = Steps(out, [{"key": str(index.keys[i]), "sample": i} for i in chosen], settings, quiet)
    steps.run("described", describe_batch, config.batch_size)
    added: dict[str, Any] = {"continuation": config.continuation, "continue_up_to": config.continue_up_to}
    steps.run("continued", continue_batch, config.batch_size, **added)
    added = {"repair": config.repair, "llm": client.backend.model, "llm_settings": client.backend.settings}
    mend = partial(repair, client=client, prompt=config.repair, unrepaired=config.unrepaired)
    steps.run("repaired", mend, **added)
    rows = steps.run("filtered", partial(sift, rules=config.rules), rules=config.rules)
    return [row for row in rows if not row["caught"]]


def _write(
    config: CurateMiniGPT4Config, index: ShardIndex, out: Path, items: Sequence[Row], decisions: dict[str, Row]
) -> dict[str, Any]:
    """Step 6: shards of what was accepted or edited; without a review, of all items."""
    rejected = {"action": "reject"}
    wanted = [
        row for row in items if config.review == "none" or decisions.get(row["key"], rejected)["action"] != "reject"
    ]
    if not wanted:
        raise DataError(f"all descriptions in {out} were rejected, by rules or by a person.")
    histories = {name: by_key(step_rows(out, name)) for name in ("described", "continued", "repaired")}
    with ShardWriter(out / SHARDS, overwrite=True, quiet=True) as writer:
        for row in wanted:
            history = {name: rows[row["key"]] for name, rows in histories.items()}
            writer.write(row["key"], _sample(index, row, decisions.get(row["key"]), history))
    return {"samples": len(wanted), "hash": writer.index.hash}


def _sample(index: ShardIndex, row: Row, decision: Row | None, history: dict[str, Row]) -> Members:
    """The unchanged image, and its description as the `caption` with its history as the `provenance`."""
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


def reviewed_images(out: Path) -> ShardIndex:
    """Open the images of a curation.

    Raises:
        ConfigError: `out` is not a curation.
        DataError: the images are missing or have changed.
    """
    try:
        root = json.loads((out / DATA).read_text(encoding="utf-8"))["data"]
        settings = read_rows(journal_of(out, "described"))[0]["settings"]
    except (FileNotFoundError, NotADirectoryError, IndexError):
        raise ConfigError(f"There is no curation in {out}; `mmlab curate minigpt4 out={out} …` starts one.") from None
    index = ShardIndex.open(root)
    if index.hash != settings["data"]:
        raise DataError(f"{index.root} has changed since {out} was made from it.")
    return index
