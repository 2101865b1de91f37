"""Mutated records and members through everything that reads data: fuzz_data.py OUT [MUTATIONS] [SEED].

Each round has 25 mutated samples among 25 whole ones. Nothing may end in another way than a counted bad sample or a
sentence (ConfigError, DataError), and no whole sample may be called bad. The last line is one JSON object.
"""

import csv
import io
import json
import shutil
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from mutations import NAMES, mutated_bytes, mutated_image, mutated_json, mutated_text
from tiny_samples import CLASSES, SIDE, mutated, picture, record, whole

from mmlab.config.errors import UserError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.building import REST, write_rows
from mmlab.data.cache_collate import CodeCollate, LatentCollate
from mmlab.data.collate import ChatCollate, PairCollate
from mmlab.data.config import ImageDataConfig, ImageTextDataConfig, Prompt
from mmlab.data.image_collate import ImageCollate
from mmlab.data.image_condition import Conditioning
from mmlab.data.index import ShardIndex
from mmlab.data.indexing import build_index
from mmlab.data.mixture import Source
from mmlab.data.reader import Collate, LocalBatches, OnePass
from mmlab.data.sample_types import ImageSpec
from mmlab.data.shard_stats import stats
from mmlab.data.sources.captions import captions
from mmlab.data.sources.image_folder import images
from mmlab.data.sources.llava_json import llava_json
from mmlab.data.tokenizer import train_tokenizer
from mmlab.data.verification import verify
from mmlab.evaluate.answer_report import answer_scores, draw_grid, worst_page
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.config import METRICS
from mmlab.evaluate.descriptions import caption_questions, describe, description_scores, judge
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.recorded_outputs import read_predictions, read_references
from mmlab.evaluate.scores.scorers import scorable, scorer_named
from mmlab.report.shard_sheet import sample_sheet

PER_ROUND = 25


class Unasked(Answerer):
    """Makes prompts as an `Answerer`, and answers each with the same text, without a model."""

    def __init__(self, prompt: Prompt, tokenizer: Any):
        self.prompt, self.tokenizer, self.spec = prompt, tokenizer, ImageSpec(SIDE, "pad", 4)
        self.model: Any = SimpleNamespace(language=SimpleNamespace(vocabulary=len(tokenizer)))

    def complete(self, prompts, pictures):
        return [("red", True) for _ in prompts]


class Fuzz:
    """Rounds of mutated samples, counted by what became of them.

    Attributes:
        ends: step → how it ended: `ok` or the class of its error → number.
        reasons: reason → bad samples that were counted under it.
        sentences: step → its first error.
        failures: everything that should not have happened, with the round that repeats it.
    """

    def __init__(self, out: Path, seed: int):
        self.out, self.seed, self.round = out, seed, 0
        self.ends: dict[str, Counter[str]] = {}
        self.reasons: Counter[str] = Counter()
        self.failures: list[str] = []
        self.sentences: dict[str, str] = {}
        shutil.rmtree(out / "whole", ignore_errors=True)
        self.write_tar(out / "whole", {f"w{n}": whole(n, Random(n)) for n in range(PER_ROUND)})
        self.tokenizer: Any = train_tokenizer([build_index(out / "whole", quiet=True)], out / "tokenizer", quiet=True)
        turn = "{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}"
        self.tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}"
        self.collates = list(self.make_collates())

    def make_collates(self) -> Iterable[tuple[str, Collate]]:
        """Every collate, with every template and use of a record."""
        text = ImageTextDataConfig(root="", global_batch=1, micro_batch=1, max_length=400)
        spec = ImageSpec(SIDE, "pad", 4)
        for template in ("v1", "v0", "llama_2", "chatml", "minigpt4", "plain", "tokenizer"):
            yield f"chat {template}", ChatCollate(text, Prompt(template), self.tokenizer, spec)
        uses: list[dict[str, Any]] = [{"pictures": name} for name in ("text", "scattered", "none")]
        uses += [{"turns": "every"}, {"turns": "conversations"}, {"turns": "caption", "captions": "blip"}]
        uses += [{"supervise": "all"}]
        for options in uses:
            yield f"chat {options}", ChatCollate(text, Prompt(**options), self.tokenizer, spec)
        yield "pairs", PairCollate(text, self.tokenizer, ImageSpec(SIDE))
        image = ImageDataConfig(root="", global_batch=1, micro_batch=1, size=SIDE, flip=False)
        both = Conditioning(CLASSES, self.tokenizer, 20)
        yield "images", ImageCollate(image, both, maps=True)
        yield "latents", LatentCollate(image, "made", (2, 4, 4), both)
        yield "codes", CodeCollate(image, "made", 4, both)

    def attempt(self, step: str, function: Callable[[], Any]) -> Any:
        """Run a step; a sentence is counted, and any other exception is a failure."""
        ends = self.ends.setdefault(step, Counter())
        try:
            result = function()
        except UserError as error:
            if "\n" in str(error).strip():
                self.failures.append(f"round {self.round}, {step}: more than a sentence: {error}")
            self.sentences.setdefault(step, str(error))
            ends[type(error).__name__] += 1
            return None
        except Exception:
            self.failures.append(f"round {self.round}, {step}: {traceback.format_exc()}")
            ends["failed"] += 1
            return None
        ends["ok"] += 1
        return result

    def count(self, step: str, reasons: dict[str, str]) -> None:
        """Count bad samples (key → reason); a whole sample among them is a failure."""
        self.reasons.update(reasons.values())
        for key, reason in reasons.items():
            if key.startswith("w"):
                self.failures.append(f"round {self.round}, {step}: the whole sample {key} is called bad: {reason}")

    def write_tar(self, folder: Path, samples: dict[str, dict[str, bytes]], random: Random | None = None) -> None:
        """Write a tar; with `random`, with odd names and broken bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "0.tar"
        with tarfile.open(path, "w") as tar:
            for key, members in samples.items():
                odd = random.choice(NAMES) if random and random.randrange(20) == 0 else "{}"
                for extension, data in members.items():
                    name = odd.format(f"{key}.{extension}")
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    if random and random.randrange(5000) == 0:
                        info.type, info.linkname = random.choice([b"1", b"2", b"3", b"5", b"x", b"S"]), "w0.json"
                    tar.addfile(info, io.BytesIO(data))
        if random and random.randrange(4) == 0:
            path.write_bytes(mutated_bytes(path.read_bytes(), random))

    def run(self, number: int) -> None:
        """One round."""
        self.round, random = number, Random(f"{self.seed}/{number}")
        folder = self.out / "round"
        shutil.rmtree(folder, ignore_errors=True)
        # Latents in even rounds, codes in odd ones.
        numbers = range(number % 2, number % 2 + 2 * PER_ROUND, 2)
        samples = {f"w{n}": whole(n, random) for n in numbers} | {f"m{n}": mutated(n, random) for n in numbers}
        self.write_tar(folder / "tar", samples)
        index = self.attempt("index", lambda: build_index(folder / "tar", quiet=True))
        if index is not None:
            cached = "codes" if number % 2 else "latents"
            others = [one for one in self.collates if one[0] not in ("codes", "latents")]
            self.use(index, folder, [*random.sample(others, 5), (cached, dict(self.collates)[cached])])
        self.write_tar(folder / "odd", samples, random)
        if (odd := self.attempt("index odd", lambda: build_index(folder / "odd", quiet=True))) is not None:
            self.attempt("verify", lambda: verify(ShardIndex.open(folder / "odd"), quiet=True))
            self.attempt("batches odd", lambda: self.batches("odd", odd, self.collates[0][1], counted=False))
        self.build(folder, random)
        self.recorded(folder, random)

    def use(self, index: ShardIndex, folder: Path, collates: list[tuple[str, Collate]]) -> None:
        """Training, evaluation, sheets, statistics and tokenizers of one set of shards."""
        for name, collate in collates:
            self.attempt(f"batches {name}", partial(self.batches, name, index, collate))
        self.attempt("stats", lambda: json.dumps(stats(ShardIndex.open(index.root)), allow_nan=False))
        self.attempt("sheet", lambda: sample_sheet(index, 4))
        bad = BadSamples(index.root, len(index), 1.0)
        self.attempt("tokenizer", lambda: train_tokenizer([index], folder / "tok", 300, quiet=True, bad=[bad]))
        self.count("tokenizer", {key: error.reason for key, error in bad.errors.items()})
        self.attempt("answers", lambda: self.answers(index))
        self.attempt("descriptions", lambda: self.descriptions(index))

    def batches(self, name: str, index: ShardIndex, collate: Collate, counted: bool = True) -> None:
        """One pass over the samples."""
        settings = ImageTextDataConfig(root="", global_batch=1, micro_batch=1, bad_budget=1.0, seed=self.round)
        batches = LocalBatches([Source("s", index)], collate, OnePass(len(index), 10), settings)
        for m in range(len(batches.cut)):  # type: ignore[arg-type]
            batch = batches[m]
            if counted:
                self.count(name, {bad["key"]: bad["reason"] for bad in batch["bad"]})

    def answers(self, index: ShardIndex) -> None:
        """Questions, prompts, scores of every metric, and pictures of them."""
        bad = BadSamples(index.root, len(index), 1.0)
        questions = read_questions(index, bad=bad)
        answerer = Unasked(Prompt("v1"), self.tokenizer)
        answers = dict(answer_questions(answerer, index, questions, 16, bad, own=self.round % 2 == 1))
        self.count("answers", {key: error.reason for key, error in bad.errors.items()})
        questions = [questions[n] for n in sorted(answers)]
        for metric in METRICS:
            if metric != "captions":
                self.attempt(f"score {metric}", lambda metric=metric: self.scores(metric, index, questions))

    def scores(self, metric: str, index: ShardIndex, questions: list) -> None:
        scorer, bad = scorer_named(metric), BadSamples(index.root, len(index), 1.0)
        chosen = [questions[n] for n in scorable(scorer, [question.reference for question in questions], bad)]
        scores, table = answer_scores(scorer, chosen, ["red"] * len(chosen), questions)
        json.dumps(table, allow_nan=False)
        if metric == "exact":
            draw_grid(index, chosen, ["red"] * len(chosen), scores, table)
            worst_page(index, chosen, ["red"] * len(chosen), scores, table).encode()

    def descriptions(self, index: ShardIndex) -> None:
        pictures = PictureSet(index.root, ImageSpec(SIDE), budget=1.0)
        caption_questions(pictures)
        replies = describe(Unasked(Prompt("v1", turns="caption"), self.tokenizer), pictures, 16)
        description_scores(replies, judge(replies))
        list(pictures.batches(16, "x"))
        self.count("descriptions", {key: error.reason for key, error in pictures.bad.errors.items()})

    def build(self, folder: Path, random: Random) -> None:
        """Converters, and one pass over what they write."""
        photos = folder / "photos"
        for name in CLASSES:
            (photos / name).mkdir(parents=True)
        files = [f"{CLASSES[n % 2]}/{n}.{random.choice(['jpg', 'png', 'webp', 'gif', 'bmp'])}" for n in range(10)]
        for name in files:
            kind = {"jpg": "JPEG"}.get(name[-3:], name.rpartition(".")[2].upper())
            data = picture(kind)
            (photos / name).write_bytes(mutated_image(data, random) if random.randrange(2) else data)
            caption = mutated_text("a red thing", random).encode(errors="replace")
            (photos / name).with_suffix(".txt").write_bytes(caption)
        entries = []
        for n in range(10):
            entry = {**record(n), "image": random.choice(files)}
            entries.append(mutated_json(entry, random) if n % 2 else entry)
        data = json.dumps(entries).encode()
        (folder / "chat.json").write_bytes(mutated_bytes(data, random) if random.randrange(8) == 0 else data)
        rows = [json.dumps(one) for one in entries]
        rows[5:] = [mutated_text(row, random) if random.randrange(4) == 0 else row for row in rows[5:]]
        (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8", errors="replace")
        with (folder / "rows.csv").open("w", encoding="utf-8", errors="replace", newline="") as file:
            table = csv.writer(file, quoting=random.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
            table.writerow(["image", "caption", "class"])
            table.writerows([name, mutated_text("a red thing", random), "red"] for name in files)
        sources = {
            "llava_json": lambda: llava_json(folder / "chat.json", photos, 1.0),
            "captions": lambda: captions(photos, missing_budget=1.0),
            "captions csv": lambda: captions(photos, folder / "rows.csv", missing_budget=1.0),
            "captions jsonl": lambda: captions(photos, folder / "rows.jsonl", missing_budget=1.0),
            "images": lambda: images(photos, missing_budget=1.0),
            "images jsonl": lambda: images(photos, folder / "rows.jsonl", missing_budget=1.0),
        }
        for name, source in sources.items():
            out = folder / name
            made = self.attempt(f"build {name}", lambda source=source, out=out: write_rows(source(), out, quiet=True))
            if made is not None:
                self.reasons.update(made[1].left_out)
                chat = name.startswith(("llava", "captions"))
                collate = dict(self.collates)["chat v1" if chat else "pairs"]
                if chat:
                    self.attempt(f"batches of {name}", partial(self.batches, name, made[0][REST], collate, False))

    def recorded(self, folder: Path, random: Random) -> None:
        """Recorded outputs and references, scored."""
        predictions = [{"question_id": n, "text": "red"} for n in range(8)]
        references = [{"key": str(n), "answers": ["yes"], "types": ["t"], "choices": 2} for n in range(8)]
        predictions[1] = mutated_json(predictions[1], random)
        references[2] = mutated_json(references[2], random)
        whole_file = mutated_json(predictions, random) if random.randrange(4) == 0 else predictions
        (folder / "predictions.json").write_bytes(json.dumps(whole_file).encode())
        (folder / "references.json").write_bytes(json.dumps(references).encode())
        metric = random.choice(METRICS)

        def score() -> None:
            bad = BadSamples("references", 8, 1.0)
            chosen = read_references(metric, folder / "references.json", None, "test")
            texts = read_predictions(folder / "predictions.json").aligned(chosen)
            places = scorable(scorer_named(metric), chosen, bad)
            scorer_named(metric)([texts[n] for n in places], [chosen[n] for n in places])

        self.attempt("recorded outputs", score)


def main(out: Path, mutations: int, seed: int = 0) -> dict[str, Any]:
    """Run the rounds and return the figures."""
    start = time.monotonic()
    fuzz = Fuzz(out, seed)
    rounds = -(-mutations // PER_ROUND)
    for number in range(rounds):
        fuzz.run(number)
        if number % 20 == 19:
            print(f"{number + 1} of {rounds} rounds, {len(fuzz.failures)} failures", flush=True)
    alike = {failure.strip().splitlines()[-1].split(":", 1)[-1]: failure for failure in reversed(fuzz.failures)}
    for failure in alike.values():
        print(failure)
    steps = {step: dict(sorted(ends.items())) for step, ends in sorted(fuzz.ends.items())}
    for step, ends in steps.items():
        print(f"{step:<40} {ends} {fuzz.sentences.get(step, '')[:300]}")
    return {
        "mutations": rounds * PER_ROUND,
        "failures": len(fuzz.failures),
        "bad_samples": fuzz.reasons.total(),
        "reasons": dict(fuzz.reasons.most_common()),
        "sentences": sum(ends.get(name, 0) for ends in steps.values() for name in ("ConfigError", "DataError")),
        "minutes": round((time.monotonic() - start) / 60, 1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    figures = main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    print(json.dumps(figures))
    sys.exit(bool(figures["failures"]))
