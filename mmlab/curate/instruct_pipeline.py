"""LLaVA's instruction data from captions and boxes to shards; called again, it goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmlab.config.errors import ConfigError, DataError, nearest
from mmlab.curate.client import Backend, Client, Message
from mmlab.curate.contexts import Chosen, choose
from mmlab.curate.examples import Example
from mmlab.curate.instruct_report import LOSSES, report
from mmlab.curate.journal import Row, by_key, claim, write_whole
from mmlab.curate.llava_instruct import parse, request, sift
from mmlab.curate.rules import check_rules
from mmlab.curate.steps import REPORT, SHARDS, remove_litter, run_step, step_rows
from mmlab.data.formats import IMAGE_EXTENSIONS, RESPONSE_TYPES, Members, parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.shards import ShardWriter, write_shards
from mmlab.data.sources.coco import coco
from mmlab.data.turns import IMAGE
from mmlab.keyed import draw

ENTRIES = "llava_instruct.json"


@dataclass(frozen=True)
class LLaVAInstruct:
    """The recipe; its fields are those of `mmlab.config.curate_schema.LLaVAInstructConfig`.

    Attributes:
        samples: response type → pictures that are asked for it; 0 leaves the type out.
        prompts: response type → system message.
        examples: response type → few-shot examples; none where a type is not named.
        requests: what a detailed description is asked for by.
        rules: names of the rules that catch.
        seed: of all draws.
        workers: questions at a time.
        unanswered: `retry` or `drop`, see `mmlab.curate.llava_instruct.request`.
        prices: per million tokens, of prompts and of answers; None where a cost is not known.

    Raises:
        ConfigError: an unknown rule or type, a prompt that is missing, no request, or no type to ask for.
    """

    samples: Mapping[str, int]
    prompts: Mapping[str, str]
    requests: Sequence[str]
    rules: Sequence[str]
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    seed: int = 0
    workers: int = 1
    unanswered: str = "retry"
    prices: tuple[float | None, float | None] = (None, None)

    def __post_init__(self):
        check_rules(self.rules)
        for kind in (*self.samples, *self.prompts, *self.examples):
            if kind not in RESPONSE_TYPES:
                known = ", ".join(RESPONSE_TYPES)
                raise ConfigError(f"There is no response type '{kind}'.{nearest(kind, RESPONSE_TYPES)} Types: {known}.")
        if not self.wanted:
            raise ConfigError(f"No response type is asked for; give samples.{RESPONSE_TYPES[0]}=…, say.")
        if missing := [kind for kind in self.wanted if not self.prompts.get(kind, "").strip()]:
            raise ConfigError(f"prompts.{missing[0]} is empty.")
        if not self.requests or not all(text.strip() for text in self.requests):
            raise ConfigError("requests is empty, or one of them; a detailed description has to be asked for.")

    @property
    def wanted(self) -> dict[str, int]:
        """The types that are asked for, in their order."""
        return {kind: self.samples[kind] for kind in RESPONSE_TYPES if self.samples.get(kind, 0) > 0}

    def messages(self, kind: str, context: str) -> list[Message]:
        """The question to the language model: prompt, examples, and the picture in words."""
        shots = [
            {"role": role, "content": text}
            for example in self.examples.get(kind, ())
            for role, text in (("user", example.context), ("assistant", example.reply))
        ]
        return [{"role": "system", "content": self.prompts[kind]}, *shots, {"role": "user", "content": context}]


def curate(
    recipe: LLaVAInstruct,
    index: ShardIndex,
    backend: Backend,
    out: Path,
    read: Mapping[str, int] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Ask, parse, sift and write: `out/llava_instruct.json`, `out/shards` and `out/report.json`.

    Killed at any moment and called again, it ends with the same files. A reply is paid again only if the process died
    before the reply had arrived and was written.

    Args:
        recipe: prompts, examples, rules, and how many of each type.
        index: records with captions and boxes; those without a picture go into the JSON alone.
        backend: the language model.
        out: folder, which is made.
        read: what was counted when the index was made of other files, for the report.
        quiet: show no progress.

    Returns:
        The report.

    Raises:
        ConfigError: `out` was made with other settings.
        RunError: another process curates into `out`, or questions got no answer.
        DataError: nothing can be told of any sample, or no dialogue is left.
    """
    with closing(claim(out / ".lock", "curates into")):
        remove_litter(out)
        chosen = choose(index, recipe.wanted, recipe.seed)
        kept = _steps(recipe, chosen, index, backend, out, quiet)
        written = _write(recipe, index, out, kept)
        data = {**(read or {}), "samples": len(index), "without_context": chosen.without_context}
        counts = report(out, list(recipe.wanted), recipe.prices, data, written)
        write_whole(out / REPORT, json.dumps(counts, indent=1, ensure_ascii=False) + "\n")
    if not kept:
        reasons = [(n, why) for name in LOSSES for why, n in counts["total"][name].items()]
        told = ", ".join(f"{why} {n}" for n, why in sorted(reasons, key=lambda one: -one[0])[:5])
        raise DataError(f"no dialogue of {out} is left to write, out of {len(chosen.rows)} questions: {told}.")
    return counts


def pictures(out: Path, files: Mapping[str, Any], quiet: bool = False) -> tuple[ShardIndex, dict[str, int]]:
    """COCO's files as shards in `out`, made once for each content of the files, and the counts of `coco`.

    Args:
        out: folder of the curation.
        files: `images`, `captions`, `instances`, `table` and `missing_budget`, see `mmlab.data.sources.coco.coco`.
        quiet: show no progress.

    Raises:
        ConfigError, DataError: see `coco`.
        RunError: another process curates into `out`.
    """
    about = {name: value if name == "missing_budget" else _content(value) for name, value in files.items()}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    root, counted = out / f"pictures-{name}", out / f"pictures-{name}.json"
    with closing(claim(out / ".lock", "curates into")):
        remove_litter(out)
        if counted.exists():  # it is written last
            return ShardIndex.open(root), json.loads(counted.read_text(encoding="utf-8"))
        index, counts = write_shards(coco(**files), root, overwrite=True, quiet=quiet)
        write_whole(counted, json.dumps(counts) + "\n")
        return index, counts


def _content(path: Any) -> str | None:
    """What identifies an input: a file's bytes, a folder's place."""
    if path is None or not Path(path).is_file():
        return None if path is None else str(Path(path).resolve())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(
    recipe: LLaVAInstruct, chosen: Chosen, index: ShardIndex, backend: Backend, out: Path, quiet: bool
) -> list[Row]:
    """Steps 1 to 3; what they keep, in the order of the samples."""
    settings: dict[str, Any] = {
        **{"data": index.hash, "samples": recipe.wanted, "seed": recipe.seed, "chosen": len(chosen.rows)},
        **{f"prompts.{kind}": recipe.prompts[kind] for kind in recipe.wanted},
        **{f"examples.{kind}": _hash(recipe.examples.get(kind, ())) for kind in recipe.wanted},
        **{"llm": backend.model, "llm_settings": backend.settings},
    }

    def question(row: Row) -> list[Message]:
        return recipe.messages(row["type"], chosen.contexts[row["sample"]])

    options = {"workers": recipe.workers, "unanswered": recipe.unanswered}
    ask = partial(request, ask=Client(backend, out / "replies"), question=question, **options)
    rows = run_step(out, "answered", settings, ask, chosen.rows, quiet=quiet)
    settings |= {"requests": list(recipe.requests)}
    rows = run_step(
        out, "parsed", settings, partial(parse, requests=recipe.requests, seed=recipe.seed), rows, quiet=quiet
    )
    settings |= {"rules": list(recipe.rules)}
    rows = run_step(out, "filtered", settings, partial(sift, rules=recipe.rules), rows, quiet=quiet)
    return sorted((row for row in rows if not row["caught"]), key=lambda row: row["sample"])


def _hash(examples: Sequence[Example]) -> str:
    texts = [[example.context, example.reply] for example in examples]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def _write(recipe: LLaVAInstruct, index: ShardIndex, out: Path, kept: Sequence[Row]) -> dict[str, Any]:
    """Step 4: the JSON of all that was kept, and shards of what has a picture."""
    replies = by_key(step_rows(out, "answered"))
    entries = {row["key"]: _entry(recipe, index, row) for row in kept}
    pictured = [row for row in kept if _picture(index, row["sample"]) is not None]
    written: dict[str, Any] = {"entries": len(entries), "samples": len(pictured), "hash": None}
    if not pictured:
        shutil.rmtree(out / SHARDS, ignore_errors=True)  # of other rules
    else:
        with ShardWriter(out / SHARDS, overwrite=True, quiet=True) as writer:
            for row in pictured:
                reply = replies[row["key"]]
                origin = {"recipe": "llava_instruct", "data": index.hash}
                origin |= {"model": reply["model"], "reply": reply["reply"]}
                members: Members = dict(index.read(row["sample"], IMAGE_EXTENSIONS))
                writer.write(row["key"], {**members, "json": {**entries[row["key"]], "provenance": origin}})
        written["hash"] = writer.index.hash
    write_whole(out / ENTRIES, json.dumps(list(entries.values()), ensure_ascii=False, indent=1) + "\n")
    return written


def _picture(index: ShardIndex, i: int) -> str | None:
    """The extension of a sample's picture."""
    return next((name for name in index.extensions(i) if name in IMAGE_EXTENSIONS), None)


def _entry(recipe: LLaVAInstruct, index: ShardIndex, row: Row) -> dict[str, Any]:
    """One entry in the form of llava_instruct_150k.json, with its type; the picture stands before or after the first
    question, as drawn."""
    record = parse_record(index.read(row["sample"], ("json", "txt")))
    key = str(index.keys[row["sample"]])
    name = record.get("image")
    if not isinstance(name, str) or not name:
        name = f"{key}.{_picture(index, row['sample']) or 'jpg'}"
    (first, answer), *others = row["turns"]
    before = draw(recipe.seed, f"picture/{row['key']}") < 0.5
    asked = f"{IMAGE}\n{first}" if before else f"{first}\n{IMAGE}"
    texts = [asked, answer, *(text for pair in others for text in pair)]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": str(record.get("id") or key), "image": name, "type": row["type"], "conversations": turns}
