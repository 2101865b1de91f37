"""What a run depends on, as one record: it is stored in every checkpoint and compared when one is resumed from.

`RULES` is the only place that says which of it may change between two starts, and what a change means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmlab.config.errors import RunError


@dataclass(frozen=True)
class Rule:
    """How a difference in one field of the record is treated.

    Args:
        noun: the field in a sentence; `{}` stands for the item that differs, where the field has several.
        effect: what a difference changes.
        refused: the checkpoint is not resumed from; otherwise a warning says what changes.
        shown: the two values are short enough for the sentence.
        ordered: the order of the items counts, too.
        known: items that the record does not have are not compared: a later mmlab may have more of them.
    """

    noun: str
    effect: str
    refused: bool = True
    shown: bool = False
    ordered: bool = False
    known: bool = False


RULES = {
    "run": Rule("run", "its weights, optimizer and data position are that run's", shown=True),
    "seed": Rule("seed", "every random number would change", shown=True),
    "frozen": Rule("frozen part '{}'", "what was trained so far learned beside the earlier weights"),
    "tokenizers": Rule("tokenizer of '{}'", "the same text would be other tokens"),
    "template": Rule("chat template", "the prompts would not be those that were trained"),
    "date": Rule("date in the chat template", "the prompts would not be those that were trained", shown=True),
    "train": Rule("training source '{}'", "the order of samples would change", ordered=True),
    "settings": Rule("{}", "the steps so far were made with that", shown=True, known=True),
    "training": Rule("{}", "steps before and after it are computed in different ways", refused=False, shown=True),
    "val": Rule("validation source '{}'", "val/ metrics before and after cannot be compared", refused=False),
    "code": Rule("state of the code", "steps before and after it are computed by different code", refused=False),
    "versions": Rule(
        "version of {}", "results may differ in their last digits or more", refused=False, shown=True, known=True
    ),
}

ADDED = {"trainer.compile": False, "trainer.products": "torch"}
"""Keys of `training` that the record of an earlier mmlab lacks, with the values that its steps had."""


def compare(then: Mapping[str, Any] | None, now: Mapping[str, Any], where: str) -> list[str]:
    """Compare the record in a checkpoint with that of this start.

    Args:
        then: the checkpoint's record; None from a version of mmlab that stored none.
        now: this start's record. A field that it does not have, or that is None, is not compared.
        where: the checkpoint, for messages.

    Returns:
        A sentence about each difference that is allowed.

    Raises:
        RunError: a difference that is not.
    """
    if then is None:
        return [f"{where} does not record what it depends on, so nothing was compared: an earlier mmlab saved it."]
    if then.get("training") and now.get("training"):
        added = {key: value for key, value in ADDED.items() if key in now["training"]}
        then = {**then, "training": {**added, **then["training"]}}
    warnings = []
    for field, rule in RULES.items():
        if field not in then or not _differs(then[field], now.get(field), rule):  # an earlier mmlab has fewer fields
            continue
        by = "by" if field == "run" else "with"
        sentence = f"{where} was saved {by} another {_what(field, rule, then, now)}: {rule.effect}"
        if rule.refused:
            remedy = "move it away" if field == "run" else "restore it"
            raise RunError(f"{sentence}; {remedy}, or start over with run.fresh=true.")
        warnings.append(f"{sentence}.")
    return warnings


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the fields of `RULES` that differ."""
    return [field for field, rule in RULES.items() if _differs(then.get(field), now.get(field), rule)]


def _differs(before: Any, after: Any, rule: Rule) -> bool:
    if rule.known:
        after = {item: value for item, value in after.items() if item in before} if before and after else None
    if after is None or before != after:
        return after is not None
    return rule.ordered and list(before) != list(after)


def _what(field: str, rule: Rule, then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The field, the first item of it that differs, and where it comes from or the two values."""
    before, after = then.get(field), now[field]
    noun = rule.noun
    if isinstance(after, Mapping):
        before = before or {}
        items = [item for item in {**before, **after} if before.get(item) != after.get(item)]
        if not items:
            return "order of the training sources"
        noun, before, after = noun.format(items[0]), before.get(items[0]), after.get(items[0])
        if source := now.get("sources", {}).get(items[0]) if field == "frozen" else None:
            noun += f" than {source} has now"
    if field == "run":
        names = [about.get("name") for about in (then, now)]
        return f"run, {names[0]} ({str(before)[:8]}, not {str(after)[:8]})"
    return f"{noun} ({before}, now {after})" if rule.shown else noun
