"""What is printed to a terminal or a log: control characters are shown as text, and known secrets are hidden.

Records, ids, file names and replies of endpoints come from others. An escape sequence in them could move the cursor,
change earlier lines or the clipboard, and a bidirectional override could show a text in another order.
"""

import contextlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

from mmlab.runs.redact import hide_known

# C0 without tab and newline, DEL and C1, line separators, bidirectional controls, tags, lone surrogates.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f\ud800-\udfff]"
)
# tqdm writes these alone or, the carriage return, in front of its line.
_BAR = re.compile("(\x1b\\[A|\n|\r)*")
# wandb colors its messages, which click writes.
_COLORED = ("click", "wandb")


def escaped(text: str) -> str:
    """Replace control characters by their names in Python (`\\x1b`), so that a terminal shows them."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


class Shown:
    """A stream that escapes and redacts all text written to it; everything else is the stream's own.

    Args:
        stream: standard output or error.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        writer = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        bar = _BAR.match(text) if writer == "tqdm" else None
        start = bar.end() if bar is not None else 0
        shown = hide_known(text[start:])
        self._stream.write(text[:start] + (shown if writer in _COLORED else escaped(shown)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


def print_styled(pieces: Iterable[tuple[str, str]]) -> None:
    """Print texts, escaped and redacted, each in a style of the terminal (`\x1b[1m`), or in none."""
    out = sys.stdout
    stream = out._stream if isinstance(out, Shown) else out
    for text, style in pieces:
        # Lines are styled one by one, as pagers show them.
        for line in escaped(hide_known(text)).splitlines(keepends=True):
            bare = line.rstrip("\n")
            stream.write(f"{style}{bare}\x1b[0m{line[len(bare) :]}" if style and bare else line)


def show_traceback(kind: Any, error: Any, trace: Any) -> None:
    """A `sys.excepthook` whose traceback is escaped and redacted."""
    Shown(sys.stderr).write("".join(traceback.format_exception(kind, error, trace)))


@contextlib.contextmanager
def shown_safely() -> Iterator[None]:
    """Escape and redact whatever is written to standard output and error in the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Shown(before[0]), Shown(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
