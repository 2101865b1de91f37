"""What a checkpoint depends on is compared field by field: refused, or said."""

import pytest

from mmlab.config.errors import RunError
from mmlab.runs.identity import RULES, compare, differing

THEN = {
    "run": "0123456789",
    "name": "mine",
    "seed": 0,
    "frozen": {"vision": "a", "language": "b"},
    "sources": {"vision": "runs/eye/artifacts/vision"},
    "tokenizers": {"language": "c"},
    "template": "d",
    "date": "2026-01-02",
    "settings": {"optim.lr": 0.1, "data.global_batch": 8},
    "training": {"trainer.precision": "32-true"},
    "train": {"one": "e", "two": "f"},
    "val": {"one": "g"},
    "code": "h",
    "versions": {"torch": "2.9", "numpy": "2.0"},
}
CHANGED = {
    "run": (
        "9876543210",
        "by another run, mine (01234567, not 98765432): its weights, optimizer and data position are",
    ),
    "seed": (1, "with another seed (0, now 1): every random number would change; restore it, or start over with run"),
    "frozen": (
        {"vision": "z", "language": "b"},
        "with another frozen part 'vision' than runs/eye/artifacts/vision has now: what was trained so far",
    ),
    "tokenizers": ({"language": "z"}, "another tokenizer of 'language': the same text would be other tokens"),
    "template": ("z", "another chat template: the prompts would not be"),
    "date": ("2026-01-03", "another date in the chat template (2026-01-02, now 2026-01-03)"),
    "train": ({"one": "e", "two": "z"}, "another training source 'two': the order of samples would change"),
    "settings": ({"optim.lr": 0.2, "data.global_batch": 8}, "with another optim.lr (0.1, now 0.2): the steps so far"),
    "training": (
        {"trainer.precision": "32-true", "callbacks.ema.decay": 0.9},
        "with another callbacks.ema.decay (None, now 0.9): steps before and after it are computed in different ways.",
    ),
    "val": ({"one": "z"}, "another validation source 'one': val/ metrics before and after cannot be compared."),
    "code": ("z", "another state of the code: steps before and after it are computed by different code."),
    "versions": ({"torch": "2.10", "numpy": "2.0"}, "another version of torch (2.9, now 2.10): results may differ"),
}


@pytest.mark.parametrize("field", RULES)
def test_a_difference_is_refused_or_said(field):
    value, sentence = CHANGED[field]
    now = {**THEN, field: value}
    assert differing(THEN, now) == [field]
    if RULES[field].refused:
        with pytest.raises(RunError) as error:
            compare(THEN, now, "step-5")
        text = str(error.value)
    else:
        (text,) = compare(THEN, now, "step-5")
    assert text.startswith("step-5 was saved ") and sentence in text


def test_the_same_is_accepted():
    assert compare(THEN, dict(THEN), "step-5") == []
    assert compare(THEN, {**THEN, "run": None, "name": "renamed"}, "step-5") == [], "a later rank has no id at first"
    settings = {**THEN["settings"], "optim.new": 1}
    assert compare(THEN, {**THEN, "settings": settings}, "step-5") == [], "a later mmlab has more settings"
    versions = {**THEN["versions"], "pillow": "13"}
    assert compare(THEN, {**THEN, "versions": versions}, "step-5") == [], "a later mmlab records more packages"
    assert compare({"run": THEN["run"]}, THEN, "step-5") == [], "an earlier mmlab recorded fewer fields"


@pytest.mark.parametrize(
    "train", [{"two": "f", "one": "e"}, {"one": "e"}, {"one": "e", "two": "f", "three": "x"}, {"one": "e", "new": "f"}]
)
def test_added_removed_and_reordered_training_sources_are_refused(train):
    with pytest.raises(RunError, match="the order of samples would change"):
        compare(THEN, {**THEN, "train": train}, "step-5")


def test_a_checkpoint_without_a_record_is_said():
    (text,) = compare(None, THEN, "step-5")
    assert "step-5 does not record what it depends on" in text


def test_settings_that_an_earlier_mmlab_lacked_had_their_old_values():
    then = {"training": {"trainer.precision": "32-true"}}
    now = {"training": {**then["training"], "trainer.compile": False, "trainer.products": "torch"}}
    assert compare(then, now, "step-3") == []
    now["training"]["trainer.products"] = "onednn"
    (warning,) = compare(then, now, "step-3")
    assert "another trainer.products (torch, now onednn): steps before and after it are computed in diff" in warning
