"""Few-shot examples that a user supplies, in the layout of LLaVA's published prompts.

folder/<type>/000_caps.txt     what is told of a picture          folder/<type>/000_conv.txt    the reply wanted
folder/<type>/system_message.txt     a prompt, for who wants it in place of ours
"""

from dataclasses import dataclass
from pathlib import Path

from mmlab.config.errors import ConfigError, nearest
from mmlab.curate.dialogue_text import Malformed
from mmlab.curate.llava_instruct import read_reply

_CONTEXT, _REPLY = "_caps.txt", "_conv.txt"


@dataclass(frozen=True)
class Example:
    """One picture's context, and the reply that is wanted for it."""

    context: str
    reply: str


def load_examples(folder: Path, kind: str) -> list[Example]:
    """The examples of a response type, in the order of their names.

    Raises:
        ConfigError: no such folder, a half of an example is missing, empty or not of the form that is asked for.
    """
    place = _place(folder, kind)
    names = {end: {p.name.removesuffix(end) for p in place.glob(f"*{end}")} for end in (_CONTEXT, _REPLY)}
    for name in sorted(names[_CONTEXT] ^ names[_REPLY]):
        missing = _REPLY if name in names[_CONTEXT] else _CONTEXT
        raise ConfigError(f"{place} has one half of example {name} alone: {name}{missing} is missing.")
    if not names[_CONTEXT]:
        raise ConfigError(f"{place} holds no example: 000{_CONTEXT} and 000{_REPLY} make one.")
    found = []
    for name in sorted(names[_CONTEXT]):
        example = Example(*(_text(place / f"{name}{end}") for end in (_CONTEXT, _REPLY)))
        try:
            read_reply(example.reply, kind)
        except Malformed as error:
            raise ConfigError(
                f"{place / name}{_REPLY} is not of the form asked for ({error.reason}), and would teach another."
            ) from None
        found.append(example)
    return found


def system_message(folder: Path, kind: str) -> str:
    """The prompt that lies beside the examples; raises ConfigError where there is none."""
    return _text(_place(folder, kind) / "system_message.txt")


def _place(folder: Path, kind: str) -> Path:
    place = folder / kind
    if not place.is_dir():
        siblings = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        raise ConfigError(f"There is no folder {place} with examples.{nearest(kind, siblings)}")
    return place


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    if not text:
        raise ConfigError(f"{path} is empty.")
    return text
