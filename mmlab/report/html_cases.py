"""Cases with images and texts on one page of HTML."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmlab.report.contact_sheet import BAD, CARD, FAINT, GOOD, INK, LINE, PAGE, as_picture

_STYLE = f"""
body {{ margin: 24px; background: {PAGE}; color: {INK}; font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 22px; }}
table {{ border-collapse: collapse; margin: 0 0 20px; }}
th, td {{ padding: 2px 14px; text-align: right; border-bottom: 1px solid {LINE}; font-variant-numeric: tabular-nums; }}
th {{ color: {FAINT}; font-weight: normal; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
p {{ margin: 0 0 8px; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; align-items: start; }}
article {{ background: {CARD}; border: 1px solid {LINE}; border-radius: 8px; padding: 12px; }}
article {{ border-top: 6px solid {BAD}; }}
article.good {{ border-top-color: {GOOD}; }}
img {{ display: block; margin: 0 auto 8px; max-width: 100%; }}
h2 {{ font-size: 13px; font-weight: normal; color: {FAINT}; margin: 0 0 8px; }}
dt {{ color: {FAINT}; font-size: 13px; }}
dd {{ margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }}
"""


@dataclass(frozen=True)
class Case:
    """One card of the page.

    Attributes:
        picture: a PIL image, or a tensor or array `[3, H, W]`; None shows none.
        label: a short line above the texts, such as its key.
        texts: texts below, by name.
        good: whether its edge is green, else red.
    """

    picture: Any
    label: str
    texts: dict[str, str]
    good: bool = False


def cases_page(
    title: str, cases: Sequence[Case], table: Sequence[Sequence[str]] = (), notes: Sequence[str] = ()
) -> str:
    """The page, which contains its images and needs no other file.

    Args:
        title: its heading.
        cases: its cards.
        table: rows of cells below the heading; the first one is the head.
        notes: lines below the table.
    """
    cards = "\n".join(map(_card, cases))
    above = _table(table) + "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{above}<main>\n{cards}\n</main>\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for n, row in enumerate(rows):
        tag = "td" if n else "th"
        lines.append("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row))
    return "".join(["<table>\n", *(f"<tr>{line}</tr>\n" for line in lines), "</table>\n"]) if rows else ""


def _card(case: Case) -> str:
    picture = "" if case.picture is None else f'<img alt="" src="data:image/png;base64,{_png(case.picture)}">'
    texts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in case.texts.items())
    kind = ' class="good"' if case.good else ""
    return f"<article{kind}>{picture}<h2>{escape(case.label)}</h2><dl>{texts}</dl></article>"


def _png(picture: Any) -> str:
    file = io.BytesIO()
    as_picture(picture).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
