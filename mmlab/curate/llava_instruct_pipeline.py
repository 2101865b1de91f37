"""LLaVA's instruction data from captions and boxes to shards; the same command resumes it."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import DataError
from mmlab.curate.client import Client, Message
from mmlab.curate.config import CurateLLaVAInstructConfig, InstructDataConfig
from mmlab.curate.curation_report import LOSSES, instruct_report
from mmlab.curate.journal import REPORT, SHARDS, Row, Steps, by_key, exclusive, step_rows
from mmlab.curate.llava_instruct_prompts import Example, FewShotPrompt, Questions, draw_questions
from mmlab.curate.llava_instruct_steps import parse, request, sift
from mmlab.data.building import Build, write_rows
from mmlab.data.formats import IMAGE_EXTENSIONS, Members, parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.shard_files import ShardWriter
from mmlab.data.sources.coco import coco
from mmlab.data.splits import REST
from mmlab.data.turns import IMAGE
from mmlab.keyed import draw
from mmlab.runs.disk import to_json, write_text

ENTRIES = "llava_instruct.json"


def curate(
    config: CurateLLaVAInstructConfig,
    prompts: Mapping[str, FewShotPrompt],
    index: ShardIndex,
    client: Client,
    counted: Mapping[str, int] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Request, parse, sift and write `llava_instruct.json`, `shards` and `report.json` into `config.out`.

    Killed at any moment and called again, it ends with the same files. A reply is billed again only if the process was
    killed before the reply was on disk.

    Args:
        config: settings.
        prompts: of the requested response types.
        index: records with captions and boxes; those without an image are only written to the JSON.
        client: asks the language model.
        counted: counts from the conversion of other files into the index, for the report.
        quiet: show no progress.

    Returns:
        The report.

    Raises:
        ConfigError: the folder was made with other settings.
        RunError: another process curates into the folder, or questions got no reply.
        DataError: no sample has captions or boxes, or no dialogue is left.
    """
    out = Path(config.out)
    samples = {kind: getattr(config.samples, kind) for kind in prompts}
    with exclusive(out):
        questions = draw_questions(index, samples, config.seed)
        rows = _steps(config, prompts, samples, questions, index, client, quiet)
        written = _write(config, index, out, rows)
        data = {**(counted or {}), "samples": len(index), "without_context": questions.without_context}
        report = instruct_report(out, list(prompts), config.llm, data, written)
        write_text(out / REPORT, to_json(report, indent=1, ensure_ascii=False) + "\n")
    if not rows:
        losses = [(number, reason) for name in LOSSES for reason, number in report["total"][name].items()]
        reasons = ", ".join(f"{reason} {number}" for number, reason in sorted(losses, key=lambda loss: -loss[0])[:5])
        raise DataError(f"all {len(questions.rows)} dialogues in {out} were rejected: {reasons}.")
    return report


def open_images(data: InstructDataConfig, out: Path, quiet: bool = False) -> tuple[ShardIndex, dict[str, int]]:
    """Open the shards of `data.path`, or convert COCO's files into shards in `out`, once for the files' content.

    Returns:
        The index, and the counts of the conversion.

    Raises:
        ConfigError, DataError: see `mmlab.data.sources.coco.coco`.
        RunError: another process curates into `out`.
    """
    if data.path:
        return ShardIndex.open(data.path), {}
    files = {name: getattr(data, name) for name in ("images", "captions", "instances", "table", "missing_budget")}
    identity = {name: value if name == "missing_budget" else _content(value) for name, value in files.items()}
    name = hashlib.sha256(to_json(identity, sort_keys=True).encode()).hexdigest()[:12]
    root, counts_file = out / f"pictures-{name}", out / f"pictures-{name}.json"
    with exclusive(out):
        if counts_file.exists():  # it is written last
            return ShardIndex.open(root), json.loads(counts_file.read_text(encoding="utf-8"))
        indexes, tally = write_rows(coco(**files), root, Build(overwrite=True), quiet)
        counts = tally.counts()
        write_text(counts_file, to_json(counts) + "\n")
        return indexes[REST], counts


def _content(path: str | None) -> str | None:
    """What identifies an input: the hash of a file, the path of a folder."""
    if path is None or not Path(path).is_file():
        return None if path is None else str(Path(path).resolve())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(
    config: CurateLLaVAInstructConfig,
    prompts: Mapping[str, FewShotPrompt],
    samples: dict[str, int],
    questions: Questions,
    index: ShardIndex,
    client: Client,
    quiet: bool,
) -> list[Row]:
    """Steps 1 to 3; the rows that no rule catches, in the order of the samples."""
    settings = {
        **{"data": index.hash, "samples": samples, "seed": config.seed, "chosen": len(questions.rows)},
        **{f"prompts.{kind}": prompt.system for kind, prompt in prompts.items()},
        **{f"examples.{kind}": _hash(prompt.examples) for kind, prompt in prompts.items()},
        **{"llm": client.backend.model, "llm_settings": client.backend.settings},
    }

    def question(row: Row) -> list[Message]:
        return prompts[row["type"]].messages(questions.contexts[row["sample"]])

    steps = Steps(Path(config.out), questions.rows, settings, quiet)
    steps.run("answered", partial(request, client=client, question=question, unanswered=config.unanswered))
    steps.run("parsed", partial(parse, requests=config.requests, seed=config.seed), requests=config.requests)
    rows = steps.run("filtered", partial(sift, rules=config.rules), rules=config.rules)
    return sorted((row for row in rows if not row["caught"]), key=lambda row: row["sample"])


def _hash(examples: Sequence[Example]) -> str:
    return hashlib.sha256(to_json(examples).encode()).hexdigest()[:12]


def _write(config: CurateLLaVAInstructConfig, index: ShardIndex, out: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """Step 4: the JSON of all dialogues, and shards of those with an image."""
    replies = by_key(step_rows(out, "answered"))
    entries = {row["key"]: _entry(config.seed, index, row) for row in rows}
    with_image = [row for row in rows if _extension(index, row["sample"]) is not None]
    written: dict[str, Any] = {"entries": len(entries), "samples": len(with_image), "hash": None}
    if not with_image:
        shutil.rmtree(out / SHARDS, ignore_errors=True)  # of an earlier command with other rules
    else:
        with ShardWriter(out / SHARDS, overwrite=True, quiet=True) as writer:
            for row in with_image:
                reply = replies[row["key"]]
                provenance = {"recipe": "llava_instruct", "data": index.hash}
                provenance |= {"model": reply["model"], "reply": reply["reply"]}
                members: Members = dict(index.read(row["sample"], IMAGE_EXTENSIONS))
                writer.write(row["key"], {**members, "json": {**entries[row["key"]], "provenance": provenance}})
        written["hash"] = writer.index.hash
    write_text(out / ENTRIES, to_json(list(entries.values()), ensure_ascii=False, indent=1) + "\n")
    return written


def _extension(index: ShardIndex, i: int) -> str | None:
    """The extension of a sample's image, if it has one."""
    return next((name for name in index.extensions(i) if name in IMAGE_EXTENSIONS), None)


def _entry(seed: int, index: ShardIndex, row: Row) -> dict[str, Any]:
    """One entry as in llava_instruct_150k.json, with its type; a draw puts the image before or after the question."""
    record = parse_record(index.read(row["sample"], ("json", "txt")))
    key = str(index.keys[row["sample"]])
    name = record.get("image")
    if not isinstance(name, str) or not name:
        name = f"{key}.{_extension(index, row['sample']) or 'jpg'}"
    (question, answer), *others = row["turns"]
    before = draw(seed, f"picture/{row['key']}") < 0.5
    first = f"{IMAGE}\n{question}" if before else f"{question}\n{IMAGE}"
    texts = [first, answer, *(text for pair in others for text in pair)]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": str(record.get("id") or key), "image": name, "type": row["type"], "conversations": turns}
