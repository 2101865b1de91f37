import json

import pytest

from mmlab.config.errors import DataError
from mmlab.data.counters import DataReport
from mmlab.runs.disk import write_json


def batch(source: str = "a", seen: int = 4, bad: int = 0, **counters: int) -> dict:
    replaced = {"replaced": bad, "replaced/json": bad} if bad else {}
    return {
        "stats": {source: {"seen": seen, **replaced, **counters}},
        "bad": [{"source": source, "key": f"k{i}", "reason": "json", "message": "broken"} for i in range(bad)],
    }


def test_shares_are_computed_from_the_sums(tmp_path):
    report = DataReport(0.001, 10)
    report.add(batch("a", 6, tokens=100, tokens_with_loss=25))
    report.add(batch("a", 3, bad=1, tokens=100, tokens_with_loss=35))
    report.add(batch("b", 3))
    write_json(tmp_path / "new" / "report.json", report.summary())
    written = json.loads((tmp_path / "new" / "report.json").read_text())
    assert written == report.summary()
    assert written["seen"] == 12
    assert written["sources"]["a"] == {
        "seen": 9, "replaced": 1, "replaced/json": 1, "tokens": 200, "tokens_with_loss": 60,
        "share": 0.75, "replaced_share": 1 / 9, "loss_share": 0.3,
    }  # fmt: skip
    assert written["sources"]["b"] == {"seen": 3, "share": 0.25, "replaced_share": 0.0}
    assert [bad["key"] for bad in written["bad"]] == ["k0"]


def test_the_budget_trips_with_the_source_and_its_most_common_reason():
    report = DataReport(0.01, 10)
    report.add(batch("good", 100_000))
    report.add(batch("bad", 20, bad=10))
    report.check()  # the floor
    report.add({"stats": {"bad": {"seen": 10, "replaced": 1, "replaced/pixels": 1}}})
    with pytest.raises(DataError, match=r"'bad': 11 of 30 .*bad_budget=0.01.* 'json', such as k0: broken"):
        report.check()
    report.add(batch("bad", 2000))
    report.check()  # 11 of 2030 is below one in a hundred


def test_reports_merge_through_their_state():
    one, other = DataReport(0.001, 10), DataReport(0.001, 10)
    one.add(batch("a", 4, bad=2))
    other.add(batch("b", 4, bad=1))
    merged = DataReport(0.001, 10)
    for report in (one, other):
        merged.add(json.loads(json.dumps(report.state_dict())))
    both = DataReport(0.001, 10)
    both.add(batch("a", 4, bad=2))
    both.add(batch("b", 4, bad=1))
    assert merged.summary() == both.summary()
    assert merged.replaced == 3


def test_the_list_of_bad_samples_is_bounded():
    report = DataReport(0.001, 10)
    for _ in range(3):
        report.add(batch("a", 1000, bad=400))
    assert len(report.bad) == 1000
    assert report.bad_left_out == 200
    again = DataReport(0.001, 10)
    again.add(report.state_dict())
    assert again.bad_left_out == 200
