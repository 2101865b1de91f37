"""How well a language model predicts the answers in shards. Legend: S supervised positions."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from mmlab.data.bad_samples import BadSamples
from mmlab.data.collate import ChatCollate
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.dialogues import kinds_of
from mmlab.data.formats import parse_record, record_type
from mmlab.data.index import ShardIndex
from mmlab.data.packing import Group
from mmlab.data.progress_bar import progress
from mmlab.data.record_turns import listed_in
from mmlab.data.sample_types import Sample
from mmlab.model.language import LanguageModel
from mmlab.stage.token_loss import supervised
from mmlab.weights import finite


@torch.no_grad()
def perplexities(
    language: LanguageModel,
    data: ImageTextDataConfig,
    prompt: Prompt,
    index: ShardIndex,
    bad: BadSamples,
    untyped: str,
    types: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Predict every supervised token of the shards in the form of the training.

    Args:
        language: in eval mode, on its device.
        data: its longest row.
        prompt: of the training.
        index: the shards.
        bad: counts samples that cannot be used.
        untyped: type of questions and dialogues that have none, and whose record has none.
        types: types of questions and records to read; empty: all.
        limit: at most this many samples.
        batch_size: texts that are predicted together.

    Returns:
        `questions` (number of texts), `perplexity` (e to the mean loss of a token), `answer_perplexity` (e to the mean
        loss of a whole answer), `loss` of a token, `tokens`, `answers`, and as `types` the same for each type. An
        answer is a run of predicted tokens: its words and its stop.

    Raises:
        DataError: no sample can be used, or none is of these types.
        RunError: losses that are not finite.
    """
    collates = {
        part: ChatCollate(data, replace(prompt, turns=part), language.tokenizer, None, language.vocabulary)
        for part in ("questions", "conversations", "caption")
    }
    rows: dict[str, _Row] = defaultdict(_Row)
    waiting: list[tuple[str, list[Group]]] = []
    count = min(limit or len(index), len(index))
    for i in progress(range(count), "predicting texts", count):
        key = str(index.keys[i])
        with bad.left_out(key):
            record = parse_record(index.read(i, ("json", "txt")))
            waiting += [
                (kind, collates[part].prepare(Sample(key, str(index.root), one, (), i)).content)
                for kind, part, one in _parts(record, prompt, i, untyped)
                if not types or kind in types
            ]
        if len(waiting) >= batch_size or (waiting and i == count - 1):
            _add(rows, waiting, language, collates["caption"])
            waiting = []
    if not rows:
        bad.refuse_all("texts" + f" of type {', '.join(types)}" * bool(types))
    whole = _Row()
    for row in rows.values():
        whole.add(row.loss, row.tokens, row.texts, row.answers)
    kinds = sorted(rows, key=lambda kind: (kind == untyped, kind))
    return {**whole.as_json(), "types": {kind: rows[kind].as_json() for kind in kinds}}


def _parts(
    record: dict[str, Any], prompt: Prompt, seed: int, untyped: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(type, part of the record, the record with no other question) of each question, dialogue or caption."""
    kind = record_type(record) or untyped
    for part in ["caption"] if prompt.template == "plain" else kinds_of(record, prompt.turns, seed):
        if part == "questions":
            for question in listed_in(record, "questions"):
                yield record_type(question) or kind, part, {**record, "questions": [question]}
        else:
            yield "caption" if part == "caption" else kind, part, record


def _add(
    rows: dict[str, "_Row"], texts: list[tuple[str, list[Group]]], language: LanguageModel, collate: ChatCollate
) -> None:
    """Add the losses of texts to the rows of their types."""
    batch = collate.batch([groups for _, groups in texts])
    kinds = [kind for kind, groups in texts for _ in groups]  # of each row
    device = next(language.parameters()).device
    names = ("input_ids", "segment_ids", "context_ids", "position_ids", "labels")
    ids, segments, contexts, positions, labels = (batch[name].to(device) for name in names)
    keep, targets = supervised(labels, segments)
    packed = bool((batch["segment_ids"] > 1).any())
    logits_SV = language(language.embed(ids), keep, segments, contexts, positions, packed)
    losses_S = F.cross_entropy(logits_SV.float(), targets, reduction="none")
    losses = finite(losses_S, "The language model's losses have").tolist()
    for row, loss in zip(keep.nonzero()[:, 0].tolist(), losses, strict=True):
        rows[kinds[row]].add(loss, 1)
    before = F.pad(keep, (1, 0))[:, :-1]
    for kind, answers in zip(kinds, (keep & ~before).sum(1).tolist(), strict=True):
        rows[kind].answers += answers
    for kind, _ in texts:
        rows[kind].texts += 1


@dataclass
class _Row:
    """Sums over texts."""

    loss: float = 0.0
    tokens: int = 0
    texts: int = 0
    answers: int = 0

    def add(self, loss: float, tokens: int, texts: int = 0, answers: int = 0) -> None:
        self.loss, self.tokens = self.loss + loss, self.tokens + tokens
        self.texts, self.answers = self.texts + texts, self.answers + answers

    def as_json(self) -> dict[str, float | int]:
        token, answer = self.loss / max(self.tokens, 1), self.loss / max(self.answers, 1)
        return {
            "questions": self.texts,
            "perplexity": math.exp(min(token, 700)),
            "answer_perplexity": math.exp(min(answer, 700)),
            "loss": token,
            "tokens": self.tokens,
            "answers": self.answers,
        }
