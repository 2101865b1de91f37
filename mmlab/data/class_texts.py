"""A sample's class, and the text that stands for it where a model compares images with texts. Loads without torch."""

from collections.abc import Mapping
from typing import Any

from mmlab.config.errors import ConfigError

PLACE = "{}"


def class_name(record: Mapping[str, Any], members: Mapping[str, bytes]) -> str | None:
    """The class that a record names, or else its `.cls` member; a name or a number as text, None without one."""
    name: Any = record.get("class")
    if name is None and "cls" in members:
        name = members["cls"].decode(errors="replace").strip()
    return None if name is None or name == "" else str(name)


def class_text(prompt: str, name: str) -> str:
    """The prompt with the class in its place, in words: `a photo of a {}.` and `red_apple` → `a photo of a red apple.`

    Underscores of folders' names become spaces.
    """
    return prompt.replace(PLACE, " ".join(name.replace("_", " ").split()))


def check_prompt(prompt: str, key: str) -> None:
    """Raise ConfigError for a prompt of classes without a place for the class; `key` is its setting."""
    if PLACE not in prompt:
        raise ConfigError(f"{key}={prompt!r} has no {PLACE} where the class belongs, such as 'a photo of a {PLACE}.'.")
