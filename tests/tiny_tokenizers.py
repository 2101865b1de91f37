"""Tiny tokenizers of the kinds that language models use, trained on a few sentences."""

import io
import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    "USER: What is in the picture? ASSISTANT: A red square on a blue ground.",
    "Human: Describe the image concisely. Assistant: Two yellow triangles, and a circle.",
    "system user assistant [INST] <<SYS>> <</SYS>> [/INST] ### <|im_start|> <|im_end|>",
    "0 1 2 3 4 5 6 7 8 9 \n\n ; ! ( ) - _ / < > | . , ' \" : ? # * & %",
] * 4

# As published: they differ in stripping, white space before the answer, and line breaks.
LLAMA_3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] | trim }}"
    " [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDPIECE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }} "
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def _bpe(pre: pre_tokenizers.PreTokenizer, size: int, alphabet: list[str]) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of a byte-pair encoding trained on the corpus."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def llama_3() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's splitting; adds a beginning-of-text token."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocab, merges = _bpe(pre, 500, pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[(special[0], core.token_to_id(special[0]))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=special[0], eos_token=special[1], pad_token=special[1]
    )
    fast.chat_template = LLAMA_3_TEMPLATE
    return fast


@cache
def gpt_2() -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2 and Qwen: no beginning of text is added, one token for both ends; ChatML."""
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _bpe(pre, 500, pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer, core.decoder = pre, decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast


def _sentencepiece(vocab: dict[str, int], merges: list) -> Tokenizer:
    control = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [piece for piece in vocab if piece not in control]
    ids = {piece: i for i, piece in enumerate([*control, *pieces])}
    core = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


@cache
def llama_2() -> PreTrainedTokenizerFast:
    """Llama-2's fast tokenizer: "▁" before each text, bytes for unknown characters, no splitting."""
    vocab, merges = _bpe(pre_tokenizers.Metaspace(prepend_scheme="always"), 260, [])
    core = _sentencepiece(vocab, merges)
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.chat_template = LLAMA_2_TEMPLATE
    return fast


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """The newer form of SentencePiece: "▁" before the first word only, text split into words."""
    pre = pre_tokenizers.Metaspace(prepend_scheme="first")
    vocab, merges = _bpe(pre, 400, [])
    core = _sentencepiece(vocab, merges)
    core.pre_tokenizer = pre
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = CHATML_TEMPLATE.replace("<|im_end|>", "{{ eos_token }}")
    return fast


@cache
def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's: lower case, no white space; `[SEP]` serves as the end of text."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    fast.chat_template = WORDPIECE_TEMPLATE
    return fast


def sentencepiece_model(size: int = 360) -> bytes:
    """`tokenizer.model` as Llama's: BPE with bytes for unknown characters, all spaces kept, digits one by one."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


TOKENIZERS = {make.__name__: make for make in (llama_3, gpt_2, llama_2, metaspace, wordpiece)}
