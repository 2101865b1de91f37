"""When a request may start: spaced evenly, and not while the endpoint asks for a pause."""

import threading
import time


class Pace:
    """Gives each request its place in time, for all threads together.

    Args:
        per_minute: requests; None: as fast as they come.
    """

    def __init__(self, per_minute: float | None = None):
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next = self._held_until = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Take the next free place in time, and sleep until it, or until `stop` is set."""
        at = self._place()
        while not stop.is_set():
            if (left := at - time.monotonic()) > 0:
                stop.wait(left)
                continue
            with self._lock:
                held = at < self._held_until
            if not held:
                return
            at = self._place()  # the old one lies within a pause that began meanwhile

    def hold(self, seconds: float) -> None:
        """Let nobody start before `seconds` have passed, nor those who have a place already."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)
            self._next = max(self._next, self._held_until)

    def _place(self) -> float:
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self.interval
        return at
