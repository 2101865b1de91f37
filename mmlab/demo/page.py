"""What both pages share: their events, their visitors, and messages to them."""

import html
from collections.abc import Sequence
from typing import Any, Generic

import gradio as gr

from mmlab.demo.serving import KEPT
from mmlab.demo.visits import V, Visits

GENERATES: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that use a model: one at a time."""
AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private"}


class Handlers(Generic[V]):
    """What happens on each page when a visitor stops or leaves.

    Args:
        visits: the visitors' sessions.
    """

    def __init__(self, visits: Visits[V]):
        self.visits = visits

    def stop(self, request: gr.Request) -> None:
        """End what is computed, where it is."""
        self.visits.of(str(request.session_hash)).stop.set()

    def leave(self, request: gr.Request) -> None:
        """Delete what is kept of a visitor who closed the page."""
        self.visits.end(str(request.session_hash))


def blocks(runs: Sequence[str]) -> gr.Blocks:
    """An empty page for runs, given by their names."""
    title = f"{' and '.join(runs)} · mmlab demo"
    return gr.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT // 6, KEPT))


def warn(sentence: str) -> None:
    """Show a sentence on the page."""
    gr.Warning(html.escape(" ".join(sentence.split())), duration=30)
