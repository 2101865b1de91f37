"""Many questions at a time: who waits for whom, and when nobody answers any more."""

import threading

import pytest

from mmlab.config.errors import RunError
from mmlab.curate.asking import PATIENCE, answers
from mmlab.curate.client import NoReply, Reply

ROWS = [{"key": f"r{i}"} for i in range(20)]


def user(row):
    return [{"role": "user", "content": row["key"]}]


def test_slow_failures_at_the_end_are_no_broken_endpoint():
    """Six that never answer come back when all others are through, one after the other."""
    gate, good = threading.Event(), 0

    def ask(messages, stop):
        nonlocal good
        if int(messages[0]["content"][1:]) < 6:
            assert gate.wait(5)
            raise NoReply("timeout", "no answer.", down=True)
        good += 1
        if good == 14:
            gate.set()
        return Reply("yes")

    found = [(row["key"], isinstance(reply, NoReply)) for row, reply in answers(ROWS, ask, user, 7)]
    assert sorted(found) == sorted((row["key"], i < 6) for i, row in enumerate(ROWS))


@pytest.mark.parametrize("workers", [1, 4])
def test_nobody_is_asked_for_ever(workers):
    asked = []

    def ask(messages, stop):
        asked.append(messages)
        if len(asked) < 4:
            return Reply("yes")
        raise NoReply("500", "no answer.", down=True)

    with pytest.raises(RunError, match=r"5 in a row got no answer, now r\d+: no answer"):
        list(answers(ROWS, ask, user, workers))
    assert len(asked) <= 3 + PATIENCE + 3 * workers


def test_silence_now_and_then_is_no_broken_endpoint():
    """It is what comes in a row that counts, however often nothing answered before."""

    def ask(messages, stop):
        if int(messages[0]["content"][1:]) % 2:
            raise NoReply("timeout", "no answer.", down=True)
        return Reply("yes")

    found = [isinstance(reply, NoReply) for _, reply in answers(ROWS, ask, user, 1)]
    assert len(found) == 20 and sum(found) == 10 > PATIENCE


def test_answers_that_are_cut_off_are_answers():
    def ask(messages, stop):
        raise NoReply("finish_reason length", "cut.", spent=Reply("half", "length"), kept=True)

    assert len(list(answers(ROWS, ask, user, 2))) == 20
