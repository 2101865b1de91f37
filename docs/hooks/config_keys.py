"""The reference of config keys: a table for each settings dataclass, with the comments that `--help keys` prints."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from mmlab.config.compose import conf_dir
from mmlab.config.fields import BOUNDS
from mmlab.config.help import field_comments
from mmlab.config.schemas import schemas

FOLDERS = ("verbs", "runs", "data", "model", "diffusion", "stage", "training", "evaluate", "curate")
INTRODUCTION = """# Config keys

Every key of every config, with its default, what it accepts, and what it sets. `mmlab train --help keys` prints the
same for the keys of one config, with the values that it has there:
```
mmlab train --help keys experiment=llava/align_tiny
```
A table belongs to one class: its heading names the settings, the line below it the options that choose them
(`model/vision=clip_tiny`), which set some of the keys to values of their own. Keys that a table shares with others are
repeated in each.
"""


def page() -> str:
    """Return the page as Markdown."""
    options = options_by_schema()
    lines = [INTRODUCTION]
    for folder in FOLDERS:
        kinds = [kind for kind in schemas().values() if kind.__module__ == f"mmlab.{folder}.config"]
        module = inspect.getmodule(kinds[0])
        lines.append(f"## mmlab.{folder}\n\n{inspect.getdoc(module)}\n")
        for kind in kinds:
            lines += _section(kind, options.get(kind.__name__, []))
    return "\n".join(lines)


def options_by_schema() -> dict[str, list[str]]:
    """Return the options of config groups, such as `model/vision=clip_tiny`, by the name of their dataclass."""
    found: dict[str, list[str]] = {}
    for file in sorted(conf_dir().rglob("*.yaml")):
        group = file.parent.relative_to(conf_dir()).as_posix()
        schema = "" if group.startswith("experiment") else _schema(file)
        if schema:
            found.setdefault(schema, []).append(f"{group}={file.stem}" if group != "." else f"conf/{file.name}")
    return found


def _schema(file: Path) -> str:
    """The dataclass that an option file names, or that of the option it begins with."""
    defaults = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", [])
    for entry in defaults:
        if match := re.fullmatch(r"/schema/(\w+)(@_here_)?", str(entry)):
            return match[1]
        if isinstance(entry, str) and (file.parent / f"{entry}.yaml").is_file():
            return _schema(file.parent / f"{entry}.yaml")
    return ""


def _section(kind: type, options: list[str]) -> Iterator[str]:
    yield f"### {kind.__name__}\n"
    words = inspect.getdoc(kind) or ""
    if words and not words.startswith(f"{kind.__name__}("):  # the signature that dataclasses write
        yield f"{words}\n"
    target = getattr(kind, "_target_", MISSING)
    if isinstance(target, str) and target != MISSING and target.startswith("mmlab."):
        yield f"Settings of [`{target.rpartition('.')[2]}`][{target}].\n"
    if options:
        yield f"Options: {', '.join(f'`{option}`' for option in options)}.\n"
    rows = [_row(kind, field) for field in dataclasses.fields(kind) if not field.name.startswith("_")]
    yield "\n".join(["| key | default | accepts | what it sets |", "|---|---|---|---|", *rows, ""]) if rows else ""


def _row(kind: type, field: dataclasses.Field) -> str:
    comment = re.sub(r"([_*<{\[])", r"\\\1", field_comments(kind).get(field.name, ""))  # a text, not Markdown
    cells = [f"`{field.name}`", _default(field), _accepts(field), comment]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        if dataclasses.is_dataclass(field.default_factory):
            return f"[{field.default_factory.__name__}](#{field.default_factory.__name__.lower()})"
        return _code(field.default_factory())
    return "required" if field.default in (MISSING, dataclasses.MISSING) else _code(field.default)


def _code(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, str) and (len(value) > 60 or "\n" in value):
        return "a text"
    if isinstance(value, list | tuple) and len(str(value)) > 60:
        return f"a list of {len(value)}"
    return f"`{value}`" if value != "" else '`""`'


def _accepts(field: dataclasses.Field) -> str:
    facts = field.metadata
    if choices := facts.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if "group" in facts:
        return f"an option of `{facts['group']}`" if facts["group"] else "a section"
    if "entries" in facts:
        name = facts["entries"].__name__
        return f"sections of [{name}](#{name.lower()}), by name"
    bounds = [f"{name.replace('_', ' ')} {facts[name]}" for name in BOUNDS if facts.get(name) is not None]
    kind = field.type if isinstance(field.type, str) else inspect.formatannotation(field.type)
    kind = re.sub(r"\b(typing\.|mmlab\.\w+\.config\.)", "", kind)
    return f"`{kind}`" + (f", {', '.join(bounds)}" if bounds else "") if kind != "Any" else ""
