"""A step's settings: the same ones go on, others are named where they differ."""

import pytest

from mmlab.config.errors import ConfigError
from mmlab.curate.steps import run_step, settle, step_rows

LONG = "Fix the error in the given paragraph. Remove any repeating sentences, meaningless characters, and so on."


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ("a", "b", "made with repair=a, not b; give another out"),
        (LONG + " Be brief.", LONG + " Be kind.", "repair=… and so on. Be brief., not … and so on. Be kind.;"),
        (LONG, LONG[:-1], "repair=…ters, and so on., not …ters, and so on;"),
        (LONG, "Mend.", "repair=Fix the error in the given paragraph. Remove any repeating s…, not Mend.;"),
        ({"max_tokens": 9, "top_p": 1.0}, {"max_tokens": 12, "top_p": 1.0}, "made with repair.max_tokens=9, not 12;"),
        ({"seed": 5}, {}, "made with repair.seed=5, not null;"),
        ({"extra": {"a": 1}}, {"extra": {"a": 1, "b": [2]}}, "made with repair.extra.b=null, not [2];"),
        (["empty"] * 9 + ["repeats"], ["empty"] * 9 + ["symbols"], '"repeats"], not …'),
    ],
)
def test_what_differs_is_shown(tmp_path, before, now, says):
    settle(tmp_path, "repaired", {"data": "x", "repair": before})
    settle(tmp_path, "repaired", {"data": "x", "repair": before})
    with pytest.raises(ConfigError) as caught:
        run_step(tmp_path, "repaired", {"data": "x", "repair": now}, lambda rows: rows, [], quiet=True)
    said = str(caught.value)
    assert says in said and len(said) < 320 + len(str(tmp_path))


def test_a_block_is_made_as_a_whole_and_what_is_there_stays(tmp_path):
    """A model's answers depend on what else is in their batch, so a killed process makes the same batches again."""
    seen: list[str] = []

    def step(some):
        seen.append("".join(row["key"] for row in some))
        yield from ({**row, "beside": len(some)} for row in some)

    journal = settle(tmp_path, "one", {})
    for key in "abc":
        journal.append({"key": key, "beside": 2})
    journal.close()
    found = run_step(tmp_path, "one", {}, step, [{"key": key} for key in "abcde"], block=2, quiet=True)
    assert seen == ["cd", "e"] and [row["beside"] for row in found] == [2, 2, 2, 2, 1]
    assert step_rows(tmp_path, "one") == found, "nothing twice"


def test_a_fault_ends_with_the_step_that_found_it(tmp_path):
    rows = [{"key": "a"}, {"key": "b"}]
    found = run_step(tmp_path, "one", {}, lambda some: ({**row, "fault": "?"} for row in some), rows, quiet=True)
    assert found == [{"key": "a", "fault": "?"}, {"key": "b", "fault": "?"}]
    assert run_step(tmp_path, "two", {}, lambda some: some, [*found, {"key": "c"}], quiet=True) == [{"key": "c"}]
