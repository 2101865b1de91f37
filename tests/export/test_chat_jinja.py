"""Chat templates in transformers give the token ids of mmlab."""

import copy

import pytest
from jinja2 import TemplateError

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.templates import TEMPLATES
from mmlab.data.turns import IMAGE, Turn
from mmlab.export.chat_ids import exact_template, writes_bos
from mmlab.export.processors import image_processor, llava_processor
from mmlab.export.transformers_modules import add_image_token
from tests.export.tiny_chats import photo, showing
from tests.model import tiny
from tests.tiny_tokenizers import TOKENIZERS


def _dialogues() -> list[list[Turn]]:
    shown = [
        Turn("human", f"{IMAGE}\nÉcris: \n\n- 3 mots", images=1),
        Turn("gpt", "no. 1 + 1 = 2"),
        Turn("human", "b c "),
    ]
    words = [Turn("human", "a b"), Turn("gpt", "Two yellow triangles,"), Turn("human", "* &"), Turn("gpt", "x\n y")]
    ends = [Turn("human", "Why?", None)]
    own = [Turn("human", f"{IMAGE}\nWho?", "Speak French.", 1)]
    several = [Turn("human", f"{IMAGE}\n{IMAGE}\nÉcris 1 ", images=2), Turn("gpt", "no."), Turn("human", "Why?")]
    inside = [Turn("human", f"a {IMAGE}{IMAGE} b\n{IMAGE} c", images=3)]
    again = [Turn("human", f"{IMAGE} Who?", images=1), Turn("gpt", "x"), Turn("human", f"{IMAGE}\nAnd now?", images=1)]
    pictures = [several[:1], several, inside, again]
    return [shown[:1], shown, words[:1], words[:3], [*words, *ends], own, *pictures]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "wordpiece"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_the_same_ids(name, template, tokenizers):
    """With the processor of transformers, for each system message, and for whole dialogues as in training; also in two
    steps, as harnesses do: the text, and its ids."""
    images = image_processor(ImageSpec(16, "stretch"), [0.5] * 3, [0.5] * 3)
    picture, compared = photo(16, 16), 0
    captions = [[Turn("human", IMAGE * count, images=count)] for count in (1, 2)]
    for system in (None, "", "Be brief."):
        if system and template.startswith(("plain", "minigpt4", "mistral")):
            continue
        prompt, spec = Prompt(template, system=system), ImageSpec(16, "stretch", 4)
        model = tiny.vlm(tokenizers[name])
        tokenizer, before = model.language.tokenizer, model.language.tokenizer.get_vocab()
        image_id = add_image_token(tokenizer, model.language.causal)
        assert tokenizer.get_vocab() == {**before, IMAGE: image_id}
        text, wrong = exact_template(prompt, tokenizer, IMAGE, spec)
        assert not wrong
        processor = llava_processor("full", images, tokenizer, spec, text)
        for dialogue in captions if template == "plain" else _dialogues():
            asked = showing(dialogue, [picture] * 3)
            try:
                one = chat_prompt(dialogue, prompt, tokenizer, [4] * 3)
            except (SampleError, ConfigError):
                with pytest.raises(TemplateError):
                    processor.apply_chat_template(asked, add_generation_prompt=True)
                continue
            theirs = processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)
            ours = list(one.input_ids)
            for start in one.image_starts:
                ours[start : start + 4] = [image_id] * 4
            assert theirs[0] == ours, (system, dialogue)
            written = processor.apply_chat_template(asked, add_generation_prompt=True)
            shown = [picture] * len(one.image_starts) or None
            assert processor(images=shown, text=written)["input_ids"][0] == ours, (system, dialogue)
            compared += 1
    assert compared >= (2 if template == "plain" else 9)


def test_a_tokenizers_own_template_keeps_the_runs_date_and_opens_answers_as_in_training(tokenizers):
    """Its generation prompt may leave out what it writes before an answer (Qwen3: an empty thought)."""
    tokenizer = copy.deepcopy(TOKENIZERS["gpt_2"]())
    tokenizer.chat_template = (
        "{{ strftime_now('%d %B %Y') }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last }}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    prompt = Prompt("tokenizer", date="2023-05-17")
    text, wrong = exact_template(prompt, tokenizer, "", None)
    asked = [{"role": "user", "content": "Hi"}]
    options = {"chat_template": text, "tokenize": False, "add_generation_prompt": True}
    written = tokenizer.apply_chat_template(asked, **options)
    assert written == "17 May 2023<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert not wrong


@pytest.mark.parametrize(
    ("name", "template", "writes"),
    [("metaspace", "v1", False), ("metaspace", "tokenizer", True), ("gpt_2", "v1", False)],
)
def test_a_template_that_has_to_write_the_bos_token(tokenizers, name, template, writes):
    """Without it, this tokenizer puts a space before the text."""
    model = tiny.vlm(tokenizers[name])
    tokenizer = model.language.tokenizer
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    add_image_token(tokenizer, model.language.causal)
    text, wrong = exact_template(Prompt(template), tokenizer, IMAGE, ImageSpec(16, "crop", 4))
    assert (writes_bos(text, tokenizer), wrong) == (writes, [])


def test_a_chat_that_training_has_no_form_for_is_refused(tokenizers):
    model = tiny.vlm(tokenizers["llama_3"])
    add_image_token(model.language.tokenizer, model.language.causal)
    text, _ = exact_template(Prompt("v1"), model.language.tokenizer, IMAGE, ImageSpec(16, "crop", 4))
    for says, asked in {
        "alternate": [{"role": "assistant", "content": "a"}],
        "Only the user": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}],
        "not audio": [{"role": "user", "content": [{"type": "audio"}]}],
    }.items():
        with pytest.raises(TemplateError, match=says):
            model.language.tokenizer.apply_chat_template(asked, chat_template=text, tokenize=False)


@pytest.mark.parametrize(
    ("content", "written"),
    [
        (["Who? ", 0], "<image>\nWho? "),
        ([0, 0, "Who?"], "<image>\n<image>\nWho?"),
        (["Is ", 0, " like ", 0, "?"], "Is <image> like <image>?"),
        (["", 0, 0, "Who?"], "<image><image>Who?"),
        ([0, 0], "<image>\n<image>"),
    ],
)
def test_where_the_pictures_of_a_message_stand(content, written, tokenizers):
    model = tiny.vlm(tokenizers["llama_3"])
    add_image_token(model.language.tokenizer, model.language.causal)
    text, _ = exact_template(Prompt("v1", system=""), model.language.tokenizer, IMAGE, ImageSpec(16, "crop", 4))
    parts = [{"type": "image"} if one == 0 else {"type": "text", "text": one} for one in content]
    asked = [{"role": "user", "content": parts}]
    rendered = model.language.tokenizer.apply_chat_template(asked, chat_template=text, tokenize=False)
    assert str(rendered).endswith(f"USER: {written}")


def test_a_tokenizer_that_ends_every_text_is_refused(tokenizers):
    tokenizer = tiny.language(tokenizers["wordpiece"]).tokenizer
    with pytest.raises(ConfigError, match="have other token ids in transformers, because of what its tokenizer adds"):
        exact_template(Prompt("v1"), tokenizer, "", None)
