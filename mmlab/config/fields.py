"""How a schema field states its options, its bounds, or the group that fills it."""

from dataclasses import Field, field
from typing import Any

from omegaconf import MISSING


def choice(*options: str) -> Any:
    """A string field that takes one of `options`; the first is the default."""
    return field(default=options[0], metadata={"choices": options})


def number(
    default: Any, above: float | None = None, at_least: float | None = None, at_most: float | None = None
) -> Any:
    """A number field with bounds, checked right after composition (None passes)."""
    return field(default=default, metadata={"above": above, "at_least": at_least, "at_most": at_most})


def section(group: str) -> Any:
    """A node that an option of `group` fills, and types."""
    return field(default=MISSING, metadata={"group": group})


def for_verb(given: Any) -> Any:
    """A field (or a plain default) that the verb reads: `build` does not pass it to the node's class."""
    rules = dict(given.metadata) if isinstance(given, Field) else {}
    default = given.default if isinstance(given, Field) else given
    return field(default=default, metadata={**rules, "verb": True})
