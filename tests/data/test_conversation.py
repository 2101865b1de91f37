"""Labels are exactly the answers and their stops, for every template and every kind of tokenizer."""

import copy
import re
from dataclasses import replace
from itertools import groupby

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, encode, pad_id, render
from mmlab.data.sample_types import SampleError
from mmlab.data.templates import TEMPLATES
from mmlab.data.turns import Turn
from tests.tiny_tokenizers import CHATML_TEMPLATE, TOKENIZERS, gpt_2, llama_2, llama_3, wordpiece

TOKENS = 3
PLACES = [TOKENS]
V1 = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
V0 = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
# What the model says for an answer, by template.
LEARNED = {
    "plain": "{a}\n",
    "v0": " {a}\n###",
    "v1": " {a}{eos}",
    "llama_2": " {a} {eos}",
    "mistral": " {a} {eos}",
    "chatml": "{a}<|im_end|>",
    "minigpt4": " {a}###",
    "minigpt4_llama_2": " {a}{eos}",
}
OWN = {
    "llama_3": "{stripped}{eos}",
    "gpt_2": "{a}<|im_end|>",
    "llama_2": " {a} {eos}",
    "metaspace": "{a}{eos}",
    "wordpiece": " {a}{eos}",
}
ANSWERS = {
    "single": ["A red square."],
    "multi": ["A red square.", "Two circles, and 3 triangles", "no"],
    "unicode": ["Ein grünes Dreieck 😀 — 三角形", "é👍🏽"],
    "markers": [
        "He said USER: hi ASSISTANT: yes",
        "### Human: a\n### Assistant: b",
        "[/INST] c <|im_start|>user\n",
    ],
    "stops": ["one</s>two", "### ###", "a<|im_end|>\nb", "<|eot_id|>"],
    "spaces": ["  two in front", "behind  ", "\nline\n\n", "\n\n", " "] + ["7"],
    "picture": ["The tag <image> opens\n<image>\n", "<image>"],
}
ANSWERS["spaces"] = [answer for answer in ANSWERS["spaces"] if answer.strip()]
QUESTIONS = [
    "What is it?",
    "Is ' ASSISTANT: ' or ### or [/INST] a <image>?\n<image> \n",
    " and  this </s>😀 ",
]

tokenizers = pytest.mark.parametrize("tokenizer", TOKENIZERS)
templates = pytest.mark.parametrize("template", TEMPLATES)
cases = pytest.mark.parametrize("case", ANSWERS)


def dialogue_of(answers: list[str], template: str = "v1", image: bool = True) -> list[Turn]:
    dialogue = []
    for i, answer in enumerate(answers[:1] if template == "plain" else answers):
        question = QUESTIONS[i % len(QUESTIONS)]
        dialogue += [
            Turn("human", f"<image>\n{question}", images=1) if image and i == 0 else Turn("human", question),
            Turn("gpt", answer),
        ]
    return dialogue


def learned(answer: str, template: str, name: str) -> str:
    form = OWN[name] if template == "tokenizer" else LEARNED[template]
    if (template, name) == ("plain", "wordpiece"):
        form = "{a}{eos}"  # it has no token for a line break
    eos = str(TOKENIZERS[name]().eos_token)
    return form.replace("{eos}", eos).replace("{stripped}", answer.strip()).replace("{a}", answer)


def runs(labels: list[int]) -> list[list[int]]:
    return [list(run) for loss, run in groupby(labels, lambda label: label != IGNORE) if loss]


def decoded(ids: list[int], name: str) -> str:
    return str(TOKENIZERS[name]().decode(ids, clean_up_tokenization_spaces=False))


def same(spoken: str, text: str, name: str) -> bool:
    """Whether `spoken` is what `text` decodes to after a tokenization that loses nothing."""
    if name == "wordpiece":
        return spoken == decoded(wordpiece()(text, add_special_tokens=False)["input_ids"], name)
    if name == "llama_2":
        text = re.sub("</s>(?!$)", "</s> ", text)  # it puts a space behind every special token
    if name in ("llama_2", "metaspace"):
        return spoken in (text, text.removeprefix(" "))  # SentencePiece shows no space in front
    return spoken == text


@tokenizers
@templates
@cases
@pytest.mark.parametrize("image", [True, False])
def test_labels_are_the_answers_and_their_stops(tokenizer: str, template: str, case: str, image: bool) -> None:
    dialogue = dialogue_of(ANSWERS[case], template, image)
    encoded = encode(dialogue, Prompt(template), TOKENIZERS[tokenizer](), PLACES)
    assert all(label in (token, IGNORE) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    spoken = [decoded(run, tokenizer) for run in runs(encoded.labels)]
    answers = [turn.text for turn in dialogue if turn.role == "gpt"]
    expected = [learned(a, template, tokenizer) for a in answers]
    assert len(spoken) == len(expected)
    assert all(same(*pair, tokenizer) for pair in zip(spoken, expected, strict=True)), (spoken, expected)
    assert encoded.image_starts == ([encoded.shared - TOKENS] if image else [])


@tokenizers
@templates
@cases
@pytest.mark.parametrize("image", [True, False])
def test_the_prompt_of_inference_is_a_prefix_of_the_training_ids(
    tokenizer: str, template: str, case: str, image: bool
) -> None:
    fast, prompt = TOKENIZERS[tokenizer](), Prompt(template)
    dialogue = dialogue_of(ANSWERS[case], template, image)
    trained = encode(dialogue, prompt, fast, PLACES)
    for turns in range(1, len(dialogue), 2):
        prompted = chat_prompt(dialogue[:turns], prompt, fast, PLACES)
        n = len(prompted.input_ids)
        assert prompted.input_ids == trained.input_ids[:n] and n < len(trained.input_ids)
        assert prompted.image_starts == trained.image_starts
        assert set(prompted.labels) <= {IGNORE}
        assert trained.labels[n] == trained.input_ids[n]  # the model speaks from here on
        assert n == 0 or trained.labels[n - 1] == IGNORE
        assert len(runs(trained.labels[:n])) == turns // 2


@pytest.mark.parametrize("tokenizer", [name for name in TOKENIZERS if name != "wordpiece"])
@pytest.mark.parametrize("template", ["plain", "v0", "v1", "llama_2"])
@pytest.mark.parametrize("case", ["single", "multi", "unicode"])
@pytest.mark.parametrize("image", [True, False])
def test_ids_are_those_of_llava(tokenizer: str, template: str, case: str, image: bool) -> None:
    fast, prompt = TOKENIZERS[tokenizer](), Prompt(template)
    dialogue = dialogue_of(ANSWERS[case], template, image)
    dialogue = [replace(t, text=t.text.replace("\n<image> \n", "")) for t in dialogue]
    rendered = render(dialogue, prompt, fast)
    before, after = (
        (rendered.text[: rendered.images[0][0]], rendered.text[rendered.images[0][1] :])
        if image
        else (
            rendered.text,
            None,
        )
    )
    expected = list(fast(before)["input_ids"])  # LLaVA tokenizes each part, and keeps the first one's bos
    if after is not None:
        part = list(fast(after)["input_ids"])
        part = part[1:] if part[:1] == [fast.bos_token_id] else part
        pad = fast.eos_token_id if fast.pad_token_id is None else fast.pad_token_id
        expected += [pad] * TOKENS + part
    assert encode(dialogue, prompt, fast, PLACES).input_ids == expected


@pytest.mark.parametrize("tokenizer", ["llama_2", "metaspace"])
@pytest.mark.parametrize(
    ("template", "before", "behind", "stop"),
    [
        ("minigpt4", "###Human: <Img>", "</Img> {q} ###Assistant: ", "###"),
        ("minigpt4_llama_2", "[INST] <Img>", "</Img> {q} [/INST] ", "</s>"),
    ],
)
@pytest.mark.parametrize("answer", ["A red square.", "ein grünes Dreieck 😀"])
def test_ids_are_those_of_minigpt4(
    tokenizer: str, template: str, before: str, behind: str, stop: str, answer: str
) -> None:
    """It tokenizes what stands before the picture, what stands behind it, and the answer, each by itself."""
    fast, question = TOKENIZERS[tokenizer](), "Describe this image in detail."

    def ids(text: str) -> list[int]:
        return list(fast(text, add_special_tokens=False)["input_ids"])

    dialogue = [Turn("human", f"<image>\n{question}", images=1), Turn("gpt", answer)]
    encoded = encode(dialogue, Prompt(template), fast, PLACES)
    prompted = [fast.bos_token_id, *ids(before), *[pad_id(fast)] * TOKENS, *ids(behind.format(q=question))]
    assert encoded.input_ids == prompted + ids(answer + stop)
    assert encoded.labels == [IGNORE] * len(prompted) + ids(answer + stop)


def test_templates_write_the_published_forms() -> None:
    first = Turn("human", "<image>\nQ1", images=1)
    dialogue = [first, Turn("gpt", "A1"), Turn("human", "Q2"), Turn("gpt", "A2")]

    def text(template: str, turns: int = 4, system: str | None = None) -> str:
        return render(dialogue[:turns], Prompt(template, system=system), llama_2(), answer=turns % 2 == 0).text

    assert text("v1") == f"{V1} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    assert text("v1", 1) == f"{V1} USER: <image>\nQ1 ASSISTANT:"
    assert text("v1", 2, system="") == "USER: <image>\nQ1 ASSISTANT: A1</s>"
    assert text("v1", 2, system="Be {eos} brief.") == "Be {eos} brief. USER: <image>\nQ1 ASSISTANT: A1</s>"
    assert text("v0") == (f"{V0}\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant: A2\n### ")
    assert text("v0", 3) == f"{V0}\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant:"
    assert text("plain", 2) == "<image>A1\n"
    assert text("plain", 1) == "<image>"
    assert text("llama_2") == (
        f"[INST] <<SYS>>\n{LLAVA_LLAMA_2}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"
    )
    assert text("llama_2", 1, system="") == "[INST] <image>\nQ1 [/INST]"
    # LLaVA's `mistral_instruct`: no second <s>, and the tokenizer puts the first.
    assert text("mistral") == "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST] A2 </s>"
    assert text("chatml") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ1"
        "<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n"
    )
    assert text("minigpt4", 2) == "###Human: <Img><image></Img> Q1 ###Assistant:  A1###"
    assert text("minigpt4", 3).endswith(" A1###Human: Q2 ###Assistant: ")
    assert text("minigpt4_llama_2") == "[INST] <Img><image></Img> Q1 [/INST]  A1</s><s>[INST] Q2 [/INST]  A2</s>"
    assert text("chatml", 1, system="") == "<|im_start|>user\n<image>\nQ1<|im_end|>\n<|im_start|>assistant\n"


@tokenizers
@cases
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_chat_template_is_the_tokenizers_own(tokenizer: str, case: str, system: str | None) -> None:
    fast, prompt = TOKENIZERS[tokenizer](), Prompt("tokenizer", system=system)
    dialogue = dialogue_of(ANSWERS[case], "tokenizer")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user" if t.role == "human" else "assistant", "content": t.text} for t in dialogue]
    assert render(dialogue, prompt, fast).text == fast.apply_chat_template(messages, tokenize=False)
    opened = fast.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert render(dialogue[:-1], prompt, fast, answer=False).text == opened


def test_a_conversation_has_its_own_system_message() -> None:
    dialogue = [Turn("human", "Q", system="Be brief."), Turn("gpt", "A")]
    assert render(dialogue, Prompt("v1"), llama_2()).text == "Be brief. USER: Q ASSISTANT: A</s>"
    assert render(dialogue, Prompt("v1", system=""), llama_2()).text == "USER: Q ASSISTANT: A</s>"
    assert render(dialogue, Prompt("v1", system="S"), llama_2()).text == "S USER: Q ASSISTANT: A</s>"
    longer = [*dialogue, Turn("human", "R"), Turn("gpt", "long " * 50)]
    kept = encode(longer, Prompt("v1"), llama_2(), (), max_length=60)
    assert kept == replace(encode(dialogue, Prompt("v1"), llama_2()), turns_dropped=1)
    assert render(dialogue, Prompt("tokenizer"), gpt_2()).text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    for template in ("minigpt4", "tokenizer"):  # the tiny Llama's chat template drops it without a word
        with pytest.raises(SampleError, match=rf"{template} has no place .* prompt\.system=''") as caught:
            render(dialogue, Prompt(template), llama_2())
        assert caught.value.reason == "system"
        assert render(dialogue, Prompt(template, system=""), llama_2()) == render(
            [replace(dialogue[0], system=None), dialogue[1]], Prompt(template), llama_2()
        )
    strict = copy.deepcopy(gpt_2())
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + str(strict.chat_template)
    )
    with pytest.raises(SampleError, match="tokenizer has no place"):
        render(dialogue, Prompt("tokenizer"), strict)
    with pytest.raises(ConfigError, match=r"leave prompt\.system out"):
        render(dialogue, Prompt("tokenizer", system="S"), strict)


def test_a_chat_template_has_no_clock_of_its_own() -> None:
    fast = copy.deepcopy(gpt_2())
    date = "{{ strftime_now('%d %b %Y, %A, %-d/%m %p %c %%d %s') }}"
    fast.chat_template = date + "<|im_end|>" + str(fast.chat_template)
    texts = {
        day: render([Turn("human", "Q"), Turn("gpt", "A")], Prompt("tokenizer", date=day), fast).text.split("<|")[0]
        for day in (Prompt.date, "2025-03-04T13:05")
    }
    assert texts == {
        "2024-07-26": "26 Jul 2024, Friday, 26/07 AM Fri Jul 26 00:00:00 2024 %d 1721952000",
        "2025-03-04T13:05": "04 Mar 2025, Tuesday, 4/03 PM Tue Mar  4 13:05:00 2025 %d 1741093500",
    }
    with pytest.raises(ConfigError, match=r"prompt\.date=today is not a date such as 2024-07-26"):
        Prompt("tokenizer", date="today")
    fast.chat_template = "{{ ['Hi', 'Hello'] | random }}" + str(gpt_2().chat_template)
    with pytest.raises(ConfigError, match="random', so it writes another prompt each time"):
        TEMPLATES["tokenizer"].stop(fast)


def test_stops() -> None:
    stops = {name: template.stop(llama_2()) for name, template in TEMPLATES.items()}
    assert stops == {
        "plain": "\n",
        "v0": "###",
        "v1": "</s>",
        "llama_2": "</s>",
        "mistral": "</s>",
        "chatml": "<|im_end|>",
        "minigpt4": "###",
        "minigpt4_llama_2": "</s>",
        "tokenizer": "</s>",
    }
    assert TEMPLATES["plain"].stop(wordpiece()) == "[SEP]"
    assert TEMPLATES["tokenizer"].stop(gpt_2()) == "<|im_end|>"  # its eos is another token


@tokenizers
@templates
@cases
def test_truncation_drops_whole_turns(tokenizer: str, template: str, case: str) -> None:
    fast, prompt = TOKENIZERS[tokenizer](), Prompt(template)
    dialogue = dialogue_of(ANSWERS[case], template)
    whole = encode(dialogue, prompt, fast, PLACES)
    assert encode(dialogue, prompt, fast, PLACES, len(whole.input_ids)) == whole
    lengths = [len(encode(dialogue[:n], prompt, fast, PLACES).input_ids) for n in range(2, len(dialogue) + 1, 2)]
    for pairs, length in enumerate(lengths[:-1], 1):
        for room in (length, lengths[pairs] - 1):
            cut = encode(dialogue, prompt, fast, PLACES, room)
            assert cut.turns_dropped == len(lengths) - pairs
            assert cut.input_ids == encode(dialogue[: 2 * pairs], prompt, fast, PLACES).input_ids
    with pytest.raises(SampleError, match="first question and answer") as error:
        encode(dialogue, prompt, fast, PLACES, lengths[0] - 1)
    assert error.value.reason == "too-long"


@tokenizers
@templates
def test_supervise_all_learns_everything_but_the_start_and_images(tokenizer: str, template: str) -> None:
    fast = TOKENIZERS[tokenizer]()
    encoded = encode(dialogue_of(["A red square."], template), Prompt(template, supervise="all"), fast, PLACES)
    unlearned = [i for i, label in enumerate(encoded.labels) if label == IGNORE]
    starts = [0] if encoded.input_ids[0] == fast.bos_token_id and fast.bos_token_id != fast.eos_token_id else []
    assert [i for i in unlearned if i not in range(encoded.shared - TOKENS, encoded.shared)] == starts


TWICE = [
    *(Turn("human", "Is <image> left of\n<image>?", images=2), Turn("gpt", "An <image>, yes.")),
    *(Turn("human", "And <image>", images=1), Turn("gpt", "No.")),
]


@tokenizers
@templates
def test_several_images_stand_in_place(tokenizer: str, template: str) -> None:
    fast, prompt = TOKENIZERS[tokenizer](), Prompt(template)
    places = [2, 3, 4]
    dialogue = TWICE
    if template == "plain":
        dialogue = [Turn("human", "<image>" * 3, images=3), Turn("gpt", "No.")]
    encoded = encode(dialogue, prompt, fast, places)
    assert len(encoded.image_starts) == 3 and encoded.shared == encoded.image_starts[2] + 4
    for start, count in zip(encoded.image_starts, places, strict=True):
        assert encoded.input_ids[start : start + count] == [pad_id(fast)] * count
        assert encoded.labels[start : start + count] == [IGNORE] * count
    spoken = [decoded(run, tokenizer) for run in runs(encoded.labels)]
    answers = [learned(turn.text, template, tokenizer) for turn in dialogue if turn.role == "gpt"]
    assert all(same(*pair, tokenizer) for pair in zip(spoken, answers, strict=True))
    if template == "plain":
        return
    asked = chat_prompt(dialogue[:3], prompt, fast, places)
    assert encoded.input_ids[: len(asked)] == asked.input_ids and asked.image_starts == encoded.image_starts
    first = encode(dialogue[:2], prompt, fast, places)
    cut = encode(dialogue, prompt, fast, places, len(encoded) - 1)
    assert cut.image_starts == encoded.image_starts[:2] and cut.turns_dropped == 1
    assert cut.input_ids == first.input_ids and first.shared == first.image_starts[1] + 3


def test_templates_with_several_images() -> None:
    def text(template: str, **options) -> str:
        return render(TWICE[:2], Prompt(template, **options), llama_2()).text

    assert text("minigpt4") == (
        "###Human: Is <Img><image></Img>  left of\n<Img><image></Img> ? ###Assistant:  An <image>, yes.###"
    )
    assert text("v1", system="") == "USER: Is <image> left of\n<image>? ASSISTANT: An <image>, yes.</s>"
    chat = gpt_2()
    messages = [{"role": role, "content": turn.text} for role, turn in zip(("user", "assistant"), TWICE, strict=False)]
    own = render(TWICE[:2], Prompt("tokenizer"), chat)
    assert own.text == chat.apply_chat_template(messages, tokenize=False) and len(own.images) == 2
    assert all(own.text[start:stop] == "<image>" for start, stop in own.images)
    segment = encode(TWICE[:2], Prompt("tokenizer"), chat, [1, 1])
    ids = [token for n, token in enumerate(segment.input_ids) if n not in segment.image_starts]
    assert decoded(ids, "gpt_2") == own.text.replace("<image>", "", 2)


def test_an_image_needs_places() -> None:
    with pytest.raises(ConfigError, match="shows 1 images, but the model has tokens for 0"):
        encode(dialogue_of(["a"]), Prompt(), llama_2())


def test_unusable_tokenizers_are_refused() -> None:
    class Slow:
        is_fast, name_or_path, bos_token, eos_token = False, "my/slow", None, "</s>"

    with pytest.raises(ConfigError, match="my/slow is not a fast one"):
        encode(dialogue_of(["a"]), Prompt(), Slow(), PLACES)  # type: ignore[arg-type]
    fast = llama_3().__class__(tokenizer_object=llama_3().backend_tokenizer)
    with pytest.raises(ConfigError, match="no eos_token"):
        encode(dialogue_of(["a"]), Prompt(), fast, PLACES)
    with pytest.raises(ConfigError, match="no chat template"):
        encode(dialogue_of(["a"]), Prompt("tokenizer"), fast, PLACES)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with pytest.raises(ConfigError, match="without a special token"):
        encode(dialogue_of(["a"]), Prompt("tokenizer"), fast, PLACES)
    fast.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ConfigError, match="once and in order"):
        encode(dialogue_of(["a"]), Prompt("tokenizer"), fast, PLACES)


@pytest.mark.parametrize("space", [None, "▁"])
def test_a_token_across_the_start_of_an_answer_is_cut(space: str | None) -> None:
    # Merges "\n" with the answer; tokenized in one go, a part of the role would be learned.
    # Where the tokenizer puts a space before a text, the cut must not add one before the answer.
    fast = unsplit_bpe("\nx", space)
    answered = [Turn("human", "Q"), Turn("gpt", "xy")]
    assert "\nx" in fast.tokenize(render(answered, Prompt("chatml"), fast).text)
    encoded = encode(answered, Prompt("chatml"), fast)
    assert fast.convert_ids_to_tokens(runs(encoded.labels)[0]) == list("xy<|im_end|>")
    prompted = chat_prompt(answered[:1], Prompt("chatml"), fast)
    assert encoded.input_ids[: len(prompted.input_ids)] == prompted.input_ids


def test_a_token_across_the_colon_of_a_role_is_cut() -> None:
    fast = unsplit_bpe(": x")
    answered = [Turn("human", "Q"), Turn("gpt", "x")]
    assert ": x" in fast.tokenize(render(answered, Prompt("v0"), fast).text)
    encoded = encode(answered, Prompt("v0"), fast)
    assert fast.convert_ids_to_tokens(runs(encoded.labels)[0]) == list(" x\n###")
    prompted = chat_prompt(answered[:1], Prompt("v0"), fast)
    assert encoded.input_ids[: len(prompted.input_ids)] == prompted.input_ids


def test_a_dialogue_without_a_token_to_learn_is_an_error() -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"H": 0}, [])))
    with pytest.raises(SampleError) as error:
        encode([Turn("human", "H"), Turn("gpt", "x")], Prompt("v0"), fast)
    assert error.value.reason == "no-loss"


def test_a_token_across_the_end_of_an_answer_is_cut() -> None:
    # Merges the stop with the next role; white space behind it may stay with it.
    fast = unsplit_bpe("### H")
    dialogue = [Turn("human", "Q"), Turn("gpt", "x"), Turn("human", "Q"), Turn("gpt", "y")]
    assert fast.tokenize(render(dialogue, Prompt("v0"), fast).text).count("### H") == 2
    encoded = encode(dialogue, Prompt("v0"), fast)
    spoken = ["".join(fast.convert_ids_to_tokens(run)) for run in runs(encoded.labels)]
    assert spoken == [" x\n###", " y\n### "]


def test_white_space_that_groups_with_what_follows_is_cut() -> None:
    # GPT-2 leaves the last line break of several to the word behind them: "\n\n" alone has other tokens.
    fast = copy.deepcopy(gpt_2())
    fast.chat_template = CHATML_TEMPLATE.replace("}}\n{{", "}}\n\n{{").replace("assistant\n", "assistant\n\n")
    answered, prompt = [Turn("human", "Q"), Turn("gpt", "A")], Prompt("tokenizer")
    alone = fast(render(answered[:1], prompt, fast, answer=False).text)["input_ids"]
    assert fast(render(answered, prompt, fast).text)["input_ids"][: len(alone)] != alone
    assert encode(answered, prompt, fast).input_ids[: len(alone)] == alone


def unsplit_bpe(word: str, space: str | None = None) -> PreTrainedTokenizerFast:
    """Characters, and merges that make `word` one token everywhere; `space` comes before a text."""
    pieces = [word[:end] for end in range(2, len(word) + 1)]
    alphabet = ["\n", "▁", *map(chr, range(32, 127))]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *pieces])}
    core = Tokenizer(models.BPE(vocab, [(piece[:-1], piece[-1]) for piece in pieces]))
    if space:
        core.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    return PreTrainedTokenizerFast(tokenizer_object=core)
