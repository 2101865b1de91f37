"""The pairs of experiments/two_pictures: one picture alone does not tell which of the two has more circles."""

from collections import Counter
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mmlab.data.dialogues import check_sample

PATH = Path(__file__).parents[1] / "experiments" / "two_pictures" / "prepare.py"
spec = spec_from_file_location("two_pictures_prepare", PATH)
assert spec and spec.loader
prepare = module_from_spec(spec)
spec.loader.exec_module(prepare)


def test_the_answers_are_balanced_and_one_picture_says_little():
    pairs = [prepare.counts(n) for n in range(480)]
    assert set(Counter(pairs).values()) == {30} and all(abs(first - second) == 1 for first, second in pairs)
    assert [prepare.best_blind(pairs, hidden) for hidden in (0, 1)] == [0.5625, 0.5625]


def test_the_records_fit_the_pictures():
    seen: set[bytes] = set()
    samples = dict(prepare.pairs("train", 4, seen))
    assert len(seen) == 8 and set(samples["00003"]) == {"png", "0.png", "json"}
    for number, members in enumerate(samples.values()):
        record = check_sample(members["json"], ("questions", "conversations"), 2)
        listed = record["conversations"][1]["value"].split(" and ")
        counts = [cells.split().count("circle") for cells in listed]
        assert tuple(counts) == prepare.counts(number) and [len(cells.split()) for cells in listed] == [16, 16]
        assert record["questions"][0]["answer"] == ("the first" if counts[0] > counts[1] else "the second")
