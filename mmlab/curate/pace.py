"""How many requests per minute an endpoint gets, whatever the number of threads."""

import threading
import time


class Pace:
    """Schedules the requests of all threads.

    Args:
        per_minute: requests per minute; None sets no limit.
    """

    def __init__(self, per_minute: float | None = None):
        self.interval = 60.0 / per_minute if per_minute else 0.0
        self._next = self._held_until = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Reserve the next free slot and sleep until it, or until `stop` is set."""
        at = self._slot()
        while not stop.is_set():
            if (left := at - time.monotonic()) > 0:
                stop.wait(left)
                continue
            with self._lock:
                held = at < self._held_until
            if not held:
                return
            at = self._slot()  # a pause began while sleeping and covers the old slot

    def hold(self, seconds: float) -> None:
        """Start no request for `seconds`, including those that have a slot already."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + seconds)
            self._next = max(self._next, self._held_until)

    def _slot(self) -> float:
        with self._lock:
            at = max(time.monotonic(), self._next)
            self._next = at + self.interval
        return at
