"""A small byte-level BPE tokenizer for models that are trained from scratch on a laptop."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.class_texts import PLACE, class_name, class_text
from mmlab.data.formats import parse_record, record_texts
from mmlab.data.index import ShardIndex
from mmlab.data.progress_bar import progress
from mmlab.runs.disk import writing

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SMALLEST = len(_ALPHABET) + 3
"""The bytes and the three special tokens, so that every text can be tokenized."""
ROLES = "USER: ASSISTANT:"
"""Template v1's words before each question and answer: as single letters they would outnumber the texts' tokens."""


def train_tokenizer(
    indexes: Sequence[ShardIndex],
    out: str | Path,
    vocab_size: int = 512,
    extra: Iterable[str] = (),
    quiet: bool = False,
    bad: Sequence[BadSamples] | None = None,
) -> PreTrainedTokenizerFast:
    """Learn merges from all texts of the shards and from `ROLES`, and save a folder that `AutoTokenizer` loads.

    Shards without texts give the names of their classes.

    A text begins with `<s>`, as LLaVA's language models expect; `</s>` ends an answer and is added by the
    template.

    Args:
        indexes: the sets of shards.
        out: folder to write.
        vocab_size: largest number of tokens, special ones included; a small corpus has fewer.
        extra: further texts to learn from, such as the words of another chat template.
        quiet: show no progress.
        bad: for each set of shards, where records that cannot be read are counted.

    Raises:
        ConfigError: `vocab_size` is smaller than the alphabet of bytes.
        DataError: the shards hold neither text nor classes, or more bad records than the budget allows.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(f"a byte-level vocabulary has at least {SMALLEST} tokens, not {vocab_size}.")
    bad = [BadSamples(index.root, len(index)) for index in indexes] if bad is None else bad
    classes: set[str] = set()
    texts = [*_texts(indexes, bad, quiet, classes), *extra]
    texts = texts or sorted(class_text(PLACE, name) for name in classes)
    if not texts:
        raise DataError("the shards hold neither texts nor classes to learn a tokenizer from.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(_ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    with writing(Path(out)):
        fast.save_pretrained(out)
    return fast


def _texts(indexes: Sequence[ShardIndex], bad: Sequence[BadSamples], quiet: bool, classes: set[str]) -> Iterator[str]:
    """Every text; the classes are added to `classes`."""
    places = ((index, i, left) for index, left in zip(indexes, bad, strict=True) for i in range(len(index)))
    for index, i, left in progress(places, "reading texts", sum(map(len, indexes)), quiet):
        record: dict[str, Any] = {}
        with left.left_out(str(index.keys[i])):
            members = index.read(i, only=("json", "txt", "cls"))
            record = parse_record(members)
            if (name := class_name(record, members)) is not None:
                classes.add(name)
        for text in record_texts(record):
            # As at the start of a line, and as after a word or "ASSISTANT:".
            yield from (text, f" {text}")
        if record.get("questions") or record.get("conversations"):
            yield ROLES
