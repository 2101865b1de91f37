"""Loading the tokenizers of pretrained parts: always fast ones, whose character offsets labels need."""

from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from sentencepiece import SentencePieceProcessor
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError
from mmlab.model.checkpoint_files import check_gguf, find, read_json, split_gguf
from mmlab.model.pretrained import NO_CODE, on_meta, reason, refuse_code
from mmlab.weights import verify_files

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
SPACE = "\u2581"
"""Stands for a space in tokens of sentencepiece."""


def fit_tokenizer(tokenizer: PreTrainedTokenizerFast, vocabulary: int, part: str) -> None:
    """Accept a tokenizer with a few tokens more than the model: texts with such a token are refused one by one.

    A padding token among them is replaced, as padding is never attended to.

    Raises:
        ConfigError: more than a tenth of the tokens have no embedding, or one that begins or ends every text.
    """
    excess = len(tokenizer) - vocabulary
    if excess * 10 > len(tokenizer):
        raise ConfigError(
            f"model.{part}: the tokenizer has {len(tokenizer)} tokens, the model only {vocabulary}; set "
            f"model.{part}.tokenizer to the model's own."
        )
    padding: Any = tokenizer.pad_token_id
    if excess > 0 and padding is not None and padding >= vocabulary:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    for name in ("bos", "eos", "pad", "unk"):
        number, token = getattr(tokenizer, f"{name}_token_id"), getattr(tokenizer, f"{name}_token")
        if isinstance(number, int) and number >= vocabulary:
            raise ConfigError(
                f"model.{part}: the model has {vocabulary} tokens, and no embedding of the tokenizer's {name}_token "
                f"'{token}'."
            )


def load_tokenizer(source: str | None, part: str = "language") -> PreTrainedTokenizerFast:
    """Load a fast tokenizer; a missing pad token becomes the end token (padding is never attended to).

    Args:
        source: hub name, local folder with `tokenizer.json` or `tokenizer.model`, or a GGUF file.
        part: name of the part that it belongs to, for messages.

    Raises:
        ConfigError: no source, unreadable, or without character offsets (not a fast tokenizer).
    """
    if source is None:
        raise ConfigError(f"model.{part}.tokenizer is not set; give a hub name or a folder with tokenizer.json.")
    refuse_code(source)
    verify_files(Path(source).expanduser(), weights=False)
    folder, gguf = split_gguf(source)
    if not gguf and Path(source).expanduser().is_dir() and not _has_tokenizer(Path(source).expanduser()):
        raise ConfigError(
            f"The folder {source} has no tokenizer ({', '.join(FILES)}); set model.{part}.tokenizer to one that has."
        )
    try:
        check_gguf(source)
        pieces = not gguf and _is_sentencepiece_alone(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}), **NO_CODE)
        if pieces and isinstance(tokenizer, LlamaTokenizer):
            tokenizer = _as_sentencepiece(tokenizer, folder)
    except Exception as error:  # tokenizers has no class of its own for a file that it cannot read
        raise ConfigError(f"The tokenizer {source} cannot be loaded: {reason(error)}") from error
    if not tokenizer.is_fast:
        raise ConfigError(f"The tokenizer {source} is not a fast one; labels need its character offsets.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def find_tokenizer(source: str | None, part: str = "language") -> PreTrainedTokenizerFast | None:
    """Like `load_tokenizer`, but None on the meta device if the source is not on this machine: nothing is downloaded,
    and the architecture states the size of the vocabulary."""
    here = source is not None and (Path(source).expanduser().is_dir() or _is_cached(source))
    return load_tokenizer(source, part) if here or not on_meta() else None


def _is_cached(name: str) -> bool:
    """Whether a tokenizer of the hub was downloaded earlier."""
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in FILES)
    except HFValidationError:  # a path
        return False


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def _is_sentencepiece_alone(source: str) -> bool:
    """Whether a source has `tokenizer.model` and no `tokenizer.json`; ValueError: it is not sentencepiece's."""
    if find(source, "tokenizer.json") is not None or (path := find(source, "tokenizer.model")) is None:
        return False
    try:
        SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            "its tokenizer.model is damaged, or not one of sentencepiece; give a folder with tokenizer.json."
        ) from error
    return True


def _as_sentencepiece(tokenizer: LlamaTokenizer, source: str) -> PreTrainedTokenizerFast:
    """Give a Llama tokenizer that was read from `tokenizer.model` alone the ids of sentencepiece for every text.

    transformers puts no space before a text that begins with one; sentencepiece always does. And it takes a folder
    without the key `legacy` for one of today; it is from a time when each text after a special token got a space, too.
    """
    config = find(source, "tokenizer_config.json")
    fields = (config and read_json(config)) or {}
    backend = tokenizer.backend_tokenizer
    if fields.get("add_prefix_space") is not False:
        # The text has no space left when the first one is put before it, so that it is put there in any case.
        scheme: Any = "first" if fields.get("legacy") is False else "always"
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(" ", scheme, split=False), pre_tokenizers.Metaspace(SPACE, "never", split=False)]
        )
    # A class of its own would be built again from the vocabulary when the tokenizer is loaded from a run.
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
    fast.chat_template = tokenizer.chat_template
    return fast
