"""Where text is cut so that no token lies half inside an answer."""

import copy
from itertools import groupby

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from mmlab.data.batch import IGNORE
from mmlab.data.config import Prompt
from mmlab.data.conversation import Turn, chat_prompt, encode, render
from mmlab.data.sample import SampleError
from tests.tiny_tokenizers import CHATML_TEMPLATE, gpt_2


@pytest.mark.parametrize("space", [None, "▁"])
def test_a_token_across_the_start_of_an_answer_is_cut(space: str | None) -> None:
    # Merges "\n" with the answer; tokenised in one go, a part of the role would be learned.
    # Where the tokenizer puts a space before a text, the cut must not add one before the answer.
    fast = unsplit_bpe("\nx", space)
    answered = [Turn("human", "Q"), Turn("gpt", "xy")]
    assert "\nx" in fast.tokenize(render(answered, Prompt("chatml"), fast).text)
    encoded = encode(answered, Prompt("chatml"), fast, None)
    assert fast.convert_ids_to_tokens(learned(encoded.labels)[0]) == list("xy<|im_end|>")
    asked = chat_prompt(answered[:1], Prompt("chatml"), fast, None)
    assert encoded.input_ids[: len(asked.input_ids)] == asked.input_ids


def test_a_token_across_the_colon_of_a_role_is_cut() -> None:
    fast = unsplit_bpe(": x")
    answered = [Turn("human", "Q"), Turn("gpt", "x")]
    assert ": x" in fast.tokenize(render(answered, Prompt("v0"), fast).text)
    encoded = encode(answered, Prompt("v0"), fast, None)
    assert fast.convert_ids_to_tokens(learned(encoded.labels)[0]) == list(" x\n###")
    asked = chat_prompt(answered[:1], Prompt("v0"), fast, None)
    assert encoded.input_ids[: len(asked.input_ids)] == asked.input_ids


def test_a_dialogue_without_a_token_to_learn_is_named() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"H": 0}, [])))
    with pytest.raises(SampleError) as error:
        encode([Turn("human", "H"), Turn("gpt", "x")], Prompt("v0"), fast, None)
    assert error.value.reason == "no-loss"


def test_a_token_across_the_end_of_an_answer_is_cut() -> None:
    # Merges the stop with the next role; white space behind it may stay with it.
    fast = unsplit_bpe("### H")
    dialogue = [Turn("human", "Q"), Turn("gpt", "x"), Turn("human", "Q"), Turn("gpt", "y")]
    assert fast.tokenize(render(dialogue, Prompt("v0"), fast).text).count("### H") == 2
    encoded = encode(dialogue, Prompt("v0"), fast, None)
    said = ["".join(fast.convert_ids_to_tokens(run)) for run in learned(encoded.labels)]
    assert said == [" x\n###", " y\n### "]


def test_white_space_that_groups_with_what_follows_is_cut() -> None:
    # GPT-2 leaves the last line break of several to the word behind them: "\n\n" alone has other tokens.
    fast = copy.deepcopy(gpt_2())
    fast.chat_template = CHATML_TEMPLATE.replace("}}\n{{", "}}\n\n{{").replace("assistant\n", "assistant\n\n")
    answered, prompt = [Turn("human", "Q"), Turn("gpt", "A")], Prompt("tokenizer")
    alone = fast(render(answered[:1], prompt, fast, answer=False).text)["input_ids"]
    assert fast(render(answered, prompt, fast).text)["input_ids"][: len(alone)] != alone
    assert encode(answered, prompt, fast, None).input_ids[: len(alone)] == alone


def learned(labels: list[int]) -> list[list[int]]:
    return [list(run) for loss, run in groupby(labels, lambda label: label != IGNORE) if loss]


def unsplit_bpe(word: str, space: str | None = None) -> PreTrainedTokenizerFast:
    """Characters, and merges that make `word` one token everywhere; `space` comes before a text."""
    pieces = [word[:end] for end in range(2, len(word) + 1)]
    alphabet = ["\n", "▁", *map(chr, range(32, 127))]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *pieces])}
    core = Tokenizer(models.BPE(vocab, [(piece[:-1], piece[-1]) for piece in pieces]))
    if space:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    return PreTrainedTokenizerFast(tokenizer_object=core)
