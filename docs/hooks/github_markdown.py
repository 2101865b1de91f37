"""The pages are written for GitHub, whose Markdown lets a list, a table or a code block follow a line of text."""

import re
from collections.abc import Iterator

CODE = re.compile(r"`[^`]*`")
FENCE = re.compile(r"`{3,}|~{3,}")
ITEM = re.compile(r"([-*+]|\d+\.) ")


def separate_blocks(text: str) -> str:
    """Return Markdown with a blank line around each code block and table, and before each list.

    What is indented, such as code in a list, stays as it is. A bar in a table's code is escaped on GitHub only.
    """
    lines: list[str] = []
    before = ""
    for line, kind in _kinds(text):
        apart = kind not in ("item", "text") or before not in ("item", "text") or (before, kind) == ("text", "item")
        if before and kind and kind != before and apart:
            lines.append("")
        lines.append(CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if kind == "table" else line)
        before = kind
    return "\n".join(lines) + "\n"


def _kinds(text: str) -> Iterator[tuple[str, str]]:
    """Each line, and what it is: `item`, `table`, `text`, the number of its code block, or nothing if it is blank."""
    fence, blocks, before = "", 0, ""
    for line in text.splitlines():
        opening = FENCE.match(line)
        if fence:
            kind = str(blocks)
            fence = "" if line.rstrip() == fence else fence
        elif opening:
            blocks += 1
            fence, kind = opening[0], str(blocks)
        elif not line.strip():
            kind = ""
        elif line.startswith("|"):
            kind = "table"
        else:
            kind = "item" if ITEM.match(line) or (line[0] == " " and before == "item") else "text"
        yield line, kind
        before = kind
