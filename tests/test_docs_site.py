"""The documentation site: what its hooks make of pages and of the settings. `make docs` builds it."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from mmlab.config.schemas import schemas

HOOKS = Path(__file__).parents[1] / "docs" / "hooks"


@pytest.fixture
def hook(monkeypatch):
    monkeypatch.syspath_prepend(str(HOOKS))
    return importlib.import_module


def test_blocks_are_separated_as_github_reads_them(hook):
    text = "Secrets are\n- a\n  b\n- c\ntext:\n```\n- code\n| code |\n```\n| a | b |\n|---|---|\n| 1 | 2 |\nend\n"
    expected = (
        "Secrets are\n\n- a\n  b\n- c\ntext:\n\n```\n- code\n| code |\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nend\n"
    )
    assert hook("github_markdown").separate_blocks(text) == expected


def test_a_bar_in_the_code_of_a_table_is_not_escaped(hook):
    row = "| `str \\| None` | a \\| b |\n"
    assert hook("github_markdown").separate_blocks(row) == "| `str | None` | a \\| b |\n"


def test_every_key_of_every_settings_class_is_in_the_reference(hook):
    page = hook("config_keys").page()
    for name, kind in schemas().items():
        _, heading, section = page.partition(f"\n### {name}\n")
        assert heading, name
        section = section.partition("\n### ")[0]
        keys = [field.name for field in dataclasses.fields(kind) if not field.name.startswith("_")]
        assert [key for key in keys if f"| `{key}` |" not in section] == []


def test_the_reference_states_defaults_bounds_options_and_comments(hook):
    page = hook("config_keys").page()
    assert "| `mfu` | `0.4` | `float`, above 0, at most 1 | share of the peak rate" in page
    assert "| `direction` | `minimize` | `minimize`, `maximize` |" in page
    assert "`model/vision=clip_tiny`" in page and "`model/vision=clip_vit_l14_336`" in page  # from another option
    assert "[`VisionEncoder`][mmlab.model.vision.VisionEncoder]" in page
    assert "name → \\{\\_target\\_: …}" in page


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://unpkg.com/mermaid"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ("<style>@import url(https://fonts.example/css);</style>", True),
        ('<img alt="a" src="https://example.org/a.png">', True),
        ('<a href="https://arxiv.org/abs/2204.02311">paper</a> <img src="drawings/run.svg">', False),
    ],
)
def test_a_page_that_loads_from_a_network_is_found(hook, html, loads):
    assert bool(hook("site_pages").NETWORK.search(html)) is loads
