"""Tokenizer and prompt of a converted checkpoint of LLaVA."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mmlab.config.errors import ConfigError
from mmlab.data.sample_types import SampleError
from mmlab.data.templates import TEMPLATES, Template
from mmlab.data.turns import IMAGE, Turn
from mmlab.model.checkpoint_files import read_json
from mmlab.model.llava_checkpoint import LlavaCheckpoint
from mmlab.model.pretrained_tokenizer import load_tokenizer
from mmlab.runs.disk import to_json

FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_MARK = "\ue000"


def copy_tokenizer(source: Path, folder: Path) -> Any:
    """Load the tokenizer of a checkpoint, without its files of other kinds; returns it.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    names = [name for name in FILES if (source / name).is_file()]
    if not {"tokenizer.model", "tokenizer.json", "vocab.json"} & set(names):
        raise ConfigError(f"{source} is not complete: it has neither tokenizer.json nor tokenizer.model.")
    for name in names:
        shutil.copyfile(source / name, folder / name)
    tokenizer = load_tokenizer(str(folder))
    for name in names:
        (folder / name).unlink()
    return tokenizer


def spare_tokens(tokenizer: Any, image_token: int | None, vocabulary: int) -> list[str]:
    """The tokens that only the port has, at the end of its vocabulary: the image's, and one for padding.

    Our model puts image features in places of their own, so it has no such token. Where other tokens follow, the
    vocabulary stays as it is and the result is empty.
    """
    if image_token is None or image_token >= vocabulary:
        return []
    last = {token: number for token, number in tokenizer.get_vocab().items() if number >= image_token}
    added = tokenizer.get_added_vocab()
    spare = {
        token for token, number in last.items() if number == image_token or token in ("<pad>", tokenizer.pad_token)
    }
    return sorted(spare, key=last.__getitem__) if spare == set(last) and spare <= set(added) else []


def cut_tokens(folder: Path, tokens: list[str]) -> None:
    """Remove added tokens from the files of a tokenizer."""
    if not tokens:
        return
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] not in tokens]
    content["padding"] = None
    path.write_text(to_json(content, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key, value in list(settings.items()):
        if value in tokens or key == "processor_class":
            del settings[key]
        elif isinstance(value, dict):
            settings[key] = {name: each for name, each in value.items() if _content(each) not in tokens}
        elif isinstance(value, list):
            settings[key] = [each for each in value if _content(each) not in tokens]
    path.write_text(to_json(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def write_generation(source: Path, folder: Path, vocabulary: int) -> None:
    """Write the tokens that begin, end and pad a text, if the checkpoint has a generation config with them."""
    stored = read_json(source / "generation_config.json")
    if stored is None:
        return
    ids = {key: stored[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if stored.get(key) is not None}
    fitting = {key: number for key, number in ids.items() if not isinstance(number, int) or number < vocabulary}
    GenerationConfig(**fitting).save_pretrained(folder)


def prompt_of(checkpoint: LlavaCheckpoint, tokenizer: Any, template: str | None) -> tuple[dict[str, Any], bool]:
    """Keys of `stage.prompt`, and whether the tokenizer's chat template is the prompt.

    Args:
        checkpoint: of which folder a chat template is read.
        tokenizer: of the language model.
        template: chosen by the user; None: the one that writes what the checkpoint's chat template writes, or else the
            one that LLaVA trained such a projector with.
    """
    kind = checkpoint.language.model_type if checkpoint.language else None
    if template is not None:
        return {"template": template}, template == "tokenizer"
    if checkpoint.image_token is not None and (text := _chat_template(checkpoint.path, tokenizer)) is not None:
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        options = {"chat_template": text, "tokenize": False, "add_generation_prompt": True}
        try:
            written = str(tokenizer.apply_chat_template([{"role": "user", "content": content}], **options))
        except Exception:  # whatever a foreign template raises
            written = ""
        # Where several templates write the same first question, the language model's own comes first.
        for name, each in sorted(TEMPLATES.items(), key=lambda pair: pair[0] != kind):
            if isinstance(each, Template) and each.asks and (prompt := _matched(each, tokenizer, written)) is not None:
                return {"template": name, **prompt}, False
        if _fits_own(tokenizer):
            return {"template": "tokenizer"}, True
        print(
            f"WARNING: no template here writes what the chat template of {checkpoint.path} writes; give the one "
            "that it was trained with as --template (plain, if that was captions alone).",
            file=sys.stderr,
        )
    if kind == "mistral" and checkpoint.pinpoints:  # LLaVA-NeXT's, which has its language model's own prompt
        return {"template": kind}, False
    return {"template": "v1" if len(checkpoint.weights["connector"]) > 2 else "v0"}, False


def _chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The chat template of a model, not only of its language model."""
    own = read_json(folder / "chat_template.json")
    return tokenizer.chat_template if own is None else own.get("chat_template")


def _matched(template: Template, tokenizer: Any, written: str) -> dict[str, Any] | None:
    """The system message with which a template writes that text, white space aside; None if with none."""
    dialogue = [Turn("human", f"{IMAGE}\nWhat is this?", images=1)]
    body = written.removeprefix(tokenizer.bos_token or "").strip()
    for system in (_MARK, "") if template.has_system else ("",):
        text = template.render(dialogue, tokenizer, system=system, answer=False).text
        words = [word for word in re.split(rf"\s+|({_MARK})", text) if word]
        pattern = r"\s*".join("(.*?)" if word == _MARK else re.escape(word) for word in words)
        if match := re.fullmatch(pattern, body, re.DOTALL):
            message = match[1].strip() if match.groups() else ""
            return {"system": None if message == template.system else message} if template.has_system else {}
    return None


def _fits_own(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template writes plain texts, with places for labels."""
    try:
        TEMPLATES["tokenizer"].render(
            [Turn("human", f"{IMAGE}\nWhat is this?", images=1)], tokenizer, system=None, answer=False
        )
    except (ConfigError, SampleError, KeyError, TypeError):
        return False
    return True
