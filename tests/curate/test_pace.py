"""When requests may start, by a clock that only waiting moves."""

from types import SimpleNamespace

import pytest

from mmlab.curate import pace
from mmlab.curate.pace import Pace


class Clock:
    """Stands for the time and for the event that ends a wait.

    Attributes:
        now: seconds.
        meanwhile: called once, in the middle of the next wait.
        stops_at: when the event is set.
    """

    def __init__(self, stops_at: float = 1e9):
        self.now, self.meanwhile, self.stops_at = 100.0, None, stops_at

    def monotonic(self) -> float:
        return self.now

    def is_set(self) -> bool:
        return self.now >= self.stops_at

    def wait(self, seconds: float) -> None:
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            self.now += seconds / 2
            meanwhile()
            seconds /= 2
        self.now = min(self.now + seconds, max(self.now, self.stops_at))


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def starts(taken: Pace, clock: Clock, count: int) -> list[float]:
    times = []
    for _ in range(count):
        taken.wait(clock)  # type: ignore[arg-type]
        times.append(round(clock.now - 100, 6))
    return times


def test_requests_are_spaced(clock):
    assert starts(Pace(600), clock, 4) == [0, 0.1, 0.2, 0.3]
    assert starts(Pace(), clock, 3) == [0.3, 0.3, 0.3]


def test_a_pause_is_for_those_who_come_later(clock):
    taken = Pace(60)
    taken.hold(5)
    taken.hold(2)
    assert starts(taken, clock, 3) == [5, 6, 7]


def test_a_pause_is_for_those_who_wait_already(clock):
    taken = Pace(60)
    assert starts(taken, clock, 1) == [0]
    clock.meanwhile = lambda: taken.hold(10)
    assert starts(taken, clock, 2) == [10.5, 11.5], "and they start one after the other"
    clock.meanwhile = lambda: taken.hold(0.1)
    assert starts(taken, clock, 1) == [12.5], "a place after the pause is kept"


def test_who_is_stopped_waits_no_longer(clock):
    taken = Pace(1)
    assert starts(taken, clock, 1) == [0]
    clock.stops_at = 103.0
    assert starts(taken, clock, 1) == [3]
