"""What the language model is given for LLaVA's data: a system message, few-shot examples, and the image in words.

Examples have the layout of LLaVA's published prompts:

folder/<type>/000_caps.txt          an image in words             folder/<type>/000_conv.txt    the desired reply
folder/<type>/system_message.txt    an optional system message
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from mmlab.config.errors import ConfigError, DataError, existing_folder, nearest
from mmlab.curate.client import Message
from mmlab.curate.config import CurateLLaVAInstructConfig
from mmlab.curate.journal import Row
from mmlab.curate.llava_instruct_steps import Malformed, parse_reply
from mmlab.data.formats import RESPONSE_TYPES, parse_record
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import SampleError
from mmlab.data.sources.files import read_text
from mmlab.keyed import draw

_CONTEXT, _REPLY = "_caps.txt", "_conv.txt"


class Example(NamedTuple):
    """An image in words and the desired reply."""

    context: str
    reply: str


class FewShotPrompt(NamedTuple):
    """How one response type is requested."""

    system: str
    examples: Sequence[Example] = ()

    def messages(self, context: str) -> list[Message]:
        """The dialogue that requests a reply to an image in words."""
        shots = [text for example in self.examples for text in example]
        roles = ["system", *("user", "assistant") * len(self.examples), "user"]
        return [{"role": r, "content": text} for r, text in zip(roles, [self.system, *shots, context], strict=True)]


def load_prompts(config: CurateLLaVAInstructConfig) -> dict[str, FewShotPrompt]:
    """The prompt of each response type that has samples, in the order of `RESPONSE_TYPES`.

    Raises:
        ConfigError: no type has samples, a prompt is empty or missing, or see `load_examples`.
    """
    folder = None if config.examples is None else Path(config.examples)
    prompts = {}
    for kind in RESPONSE_TYPES:
        if getattr(config.samples, kind) == 0:
            continue
        system = getattr(config.prompts, kind)
        if system is None:
            if folder is None:
                raise ConfigError(f"prompts.{kind}=null is read from a folder with examples; set examples=…")
            system = _text(_subfolder(folder, kind) / "system_message.txt")
        if not system.strip():
            raise ConfigError(f"prompts.{kind} is empty.")
        prompts[kind] = FewShotPrompt(system, load_examples(folder, kind) if folder else [])
    if not prompts:
        raise ConfigError(f"No response type has samples; set, for example, samples.{RESPONSE_TYPES[0]}=…")
    return prompts


def load_examples(folder: Path, kind: str) -> list[Example]:
    """The examples of a response type, sorted by name.

    Raises:
        ConfigError: there is no such folder, or an example is incomplete, empty or malformed.
    """
    place = _subfolder(folder, kind)
    names = {end: {p.name.removesuffix(end) for p in place.glob(f"*{end}")} for end in (_CONTEXT, _REPLY)}
    for name in sorted(names[_CONTEXT] ^ names[_REPLY]):
        missing = _REPLY if name in names[_CONTEXT] else _CONTEXT
        raise ConfigError(f"Example {name} in {place} is incomplete: {name}{missing} is missing.")
    if not names[_CONTEXT]:
        raise ConfigError(f"{place} contains no example, such as 000{_CONTEXT} and 000{_REPLY}.")
    examples = []
    for name in sorted(names[_CONTEXT]):
        example = Example(*(_text(place / f"{name}{end}") for end in (_CONTEXT, _REPLY)))
        try:
            parse_reply(example.reply, kind)
        except Malformed as error:
            raise ConfigError(f"{place / name}{_REPLY} does not have the form of its type ({error}).") from None
        examples.append(example)
    return examples


class Questions(NamedTuple):
    """The questions of a curation.

    Attributes:
        rows: `key` (`<sample>-<type>`), `sample` and `type` of each, grouped by type: an image that an endpoint cannot
            process is not requested three times in a row, and consecutive prompts share their beginning.
        contexts: sample → image in words.
        without_context: number of samples with neither captions nor boxes.
    """

    rows: list[Row]
    contexts: dict[int, str]
    without_context: int


def draw_questions(index: ShardIndex, samples: Mapping[str, int], seed: int) -> Questions:
    """Draw that many samples with a context for each type, or all if there are fewer.

    Args:
        index: records with captions, boxes or both; images are not needed.
        samples: type → how many.
        seed: of the draws, which are independent of each other.

    Raises:
        DataError: a record or its boxes are malformed, or no sample has a context.
    """
    contexts: dict[int, str] = {}
    for i in range(len(index)):
        try:
            context = context_of(parse_record(index.read(i, ("json", "txt"))))
        except (ValueError, SampleError) as error:
            reason = str(error).rstrip(".")
            raise DataError(f"sample '{index.keys[i]}' of {index.root} is malformed: {reason}.") from None
        if context:
            contexts[i] = context
    if not contexts:
        raise DataError(f"{index.root} contains neither captions nor boxes.")
    rows = []
    for kind, count in samples.items():
        drawn = contexts.keys()
        if count < len(contexts):
            drawn = set(sorted(contexts, key=lambda i, kind=kind: draw(seed, f"{kind}/{index.keys[i]}"))[:count])
        rows += [{"key": f"{index.keys[i]}-{kind}", "sample": i, "type": kind} for i in contexts if i in drawn]
    return Questions(rows, contexts, len(index) - len(contexts))


def context_of(record: Mapping[str, Any]) -> str:
    """One line per caption, an empty line, and `category: [x1, y1, x2, y2]` per box, as shares with three decimals.

    Args:
        record: may have `captions` or a `caption`, and `boxes` (`category`, `box`).

    Raises:
        ValueError: malformed boxes.
    """
    listed = record.get("captions")
    captions = listed if isinstance(listed, list) and listed else [record.get("caption")]
    texts = [" ".join(text.split()) for text in captions if isinstance(text, str) and text.strip()]
    boxes = record.get("boxes") or []
    if not isinstance(boxes, list):
        raise ValueError("its boxes are not a list")
    lines = [_line(box) for box in boxes]
    return "\n\n".join("\n".join(part) for part in (texts, lines) if part)


def _line(box: Any) -> str:
    category, edges = (box.get("category"), box.get("box")) if isinstance(box, dict) else (None, None)
    if not isinstance(category, str) or not category.strip() or not isinstance(edges, list) or len(edges) != 4:
        raise ValueError(f'a box is not {{"category": text, "box": [x1, y1, x2, y2]}} but {str(box)[:80]}')
    if not all(isinstance(edge, int | float) and isfinite(edge) and 0 <= edge <= 1 for edge in edges):
        raise ValueError(f"box {edges} of '{category}' is not in shares of width and height")
    return f"{' '.join(category.split())}: [{', '.join(str(round(float(edge), 3)) for edge in edges)}]"


def _subfolder(folder: Path, kind: str) -> Path:
    place = existing_folder(folder, ConfigError) / kind
    if not place.is_dir():
        siblings = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        raise ConfigError(f"There is no folder {place} with examples.{nearest(kind, siblings)}")
    return place


def _text(path: Path) -> str:
    try:
        text = read_text(path).strip()
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not text:
        raise ConfigError(f"{path} is empty.")
    return text
