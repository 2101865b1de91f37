"""A run's prompt as a Jinja template, with which transformers' `apply_chat_template` gives the run's token ids.

Messages have the roles `system` (first), `user` and `assistant`; a content is a text, or a list of `text` and `image`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from mmlab.config.errors import ConfigError
from mmlab.data.chat_template import ChatTemplate
from mmlab.data.clock import fix_clock
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, leading_bos
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.templates import Template, template_named
from mmlab.data.turns import IMAGE, Dialogue, Turn
from mmlab.runs.disk import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000answer\ue001"

# Collects `turns`, the number of `pictures` in the first one, and `system`; raises for what training has no form for.
_READ = """{%- set chat = namespace(system='', turns=[], pictures=0) -%}
{%- for message in messages -%}
{%- set part = namespace(text='', pictures=0) -%}
{%- if message['content'] is string -%}
{%- set part.text = message['content'] -%}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'text' -%}
{%- set part.text = part.text + content['text'] -%}
{%- elif content['type'] in ('image', 'image_url') -%}
{%- set part.pictures = part.pictures + 1 -%}
{%- else -%}
{{- raise_exception('The model reads text and pictures, not ' + content['type'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if loop.first and message['role'] == 'system' -%}
{%- set chat.system = part.text | trim -%}
{%- else -%}
{%- if message['role'] != ('user', 'assistant')[chat.turns | length % 2] -%}
{{- raise_exception('The messages must alternate between user and assistant, user first.') -}}
{%- endif -%}
{%- if part.pictures > @ALLOWED@ or (part.pictures and chat.turns) -%}
{{- raise_exception('@PICTURES@') -}}
{%- endif -%}
{%- set chat.pictures = chat.pictures + part.pictures -%}
{%- set chat.turns = chat.turns + [{'role': message['role'], 'content': part.text}] -%}
{%- endif -%}
{%- endfor -%}
"""
_NO_SYSTEM = """{%- if @LOST@ -%}
{{- raise_exception('The model has no place for a system message.') -}}
{%- endif -%}
"""
_WRITE = """{{- @FRONT@ -}}
@SYSTEM@
{%- for turn in chat.turns -%}
{%- if turn['role'] == 'assistant' -%}
{{- @ANSWER@ + turn['content'] + @END@ -}}
{%- if loop.last -%}{{- @TAIL@ -}}{%- endif -%}
{%- else -%}
{%- if not loop.first -%}{{- @LATER@ -}}{%- endif -%}
{%- if loop.first and chat.pictures -%}{{- @BEFORE@ + @PICTURE@ + @BEHIND@ -}}{%- endif -%}
@QUESTION@
{%- if add_generation_prompt or not loop.last -%}{{- @SPEAK@ -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
# The tokenizer's own template as a macro. The model starts to speak where an answer begins, white space left to it.
_OWN = """{%- macro own(messages, add_generation_prompt) -%}{{ '' }}@OWN@{%- endmacro -%}
{%- if chat.pictures -%}
{%- set opening = {'role': 'user', 'content': @PICTURE@ + @BEHIND@ + chat.turns[0]['content']} -%}
{%- set chat.turns = [opening] + chat.turns[1:] -%}
{%- endif -%}
@SYSTEM@
{%- if add_generation_prompt -%}
{%- set until = own(chat.turns + [{'role': 'assistant', 'content': @MARK@}], false).split(@MARK@)[0] -%}
{%- set opened = own(chat.turns, true) -%}
{%- set text = opened if until.startswith(opened) and until[opened | length:].isspace() else until -%}
{%- else -%}
{%- set text = own(chat.turns, false) -%}
{%- endif -%}
@DROPS@
{{- @FRONT@ + text -}}
"""

LATER_ANSWERS = {
    f"a later turn after the answer {answer!r}": answer for answer in ("Yes.", "A red square", "1 + 1 = 2")
}
LATER = LATER_ANSWERS.keys()


@dataclass(frozen=True)
class Join:
    """What is written so that transformers, which tokenizes a whole text, gives the same ids as mmlab, which tokenizes
    the text before and after the picture separately.

    Attributes:
        front: before the text, such as the beginning-of-text token.
        behind: after the picture.
    """

    front: str = ""
    behind: str = ""


def jinja_template(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", picture: str, join: Join) -> str:
    """Return the Jinja template of a prompt.

    Args:
        prompt: of questions, or of captions (template `plain`, which drops the question).
        tokenizer: of the run; template `tokenizer` is its own.
        picture: what stands for the picture in the text, such as `<image>`; empty: the model reads only text.
        join: what makes the token ids equal.

    Raises:
        ConfigError: the tokenizer lacks a token or chat template that the prompt's template needs.
    """
    template = template_named(prompt.template)
    refusal = "Only the first message can show a picture, and only one." if picture else "The model reads no pictures."
    read = _READ.replace("@ALLOWED@", str(int(bool(picture)))).replace("@PICTURES@", refusal)
    if isinstance(template, ChatTemplate):
        template.stop(tokenizer)  # refuses a tokenizer without a usable chat template
        behind = "('\\n' if chat.turns[0]['content'] else '')"
        own = fix_clock(str(tokenizer.get_chat_template()), prompt.date).removesuffix("\n")  # type: ignore[attr-defined]
        drops = _NO_SYSTEM.replace("@LOST@", "chat.system and chat.system not in text") if prompt.system is None else ""
        fields = {"OWN": own, "SYSTEM": _own_system(prompt), "MARK": _text(_MARK), "DROPS": drops}
        return _fill(read + _OWN, join, picture, behind, fields)
    bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
    behind = "('\\n' if turn['content'] else '')" if template.behind is None else _text(template.behind)
    fields = {
        "SYSTEM": _system(template, prompt),
        "ANSWER": _text(template.answer),
        "END": _text(template.close + template.stop(tokenizer)),
        "TAIL": _text(template.tail),
        "LATER": _text(template.later.replace("{bos}", bos)),
        "BEFORE": _text(template.before),
        "QUESTION": "{{- turn['content'] -}}" if template.asks else "",
        "SPEAK": _text(template.speak),
    }
    return _fill(read + _WRITE, join, picture, behind if template.asks else "''", fields)


def _fill(text: str, join: Join, picture: str, behind: str, fields: dict[str, str]) -> str:
    fields |= {"FRONT": _text(join.front), "PICTURE": _text(picture), "BEHIND": f"{_text(join.behind)} + {behind}"}
    return re.sub("@([A-Z]+)@", lambda match: fields[match[1]], text)


def _text(text: str) -> str:
    """A string literal of Jinja."""
    return to_json(text, ensure_ascii=False)


def _system(template: Template, prompt: Prompt) -> str:
    message = template.system if prompt.system is None else prompt.system
    if not template.has_system:
        refuse = _NO_SYSTEM.replace("@LOST@", "chat.system") if prompt.system is None else ""
        return refuse + "{{- " + _text(template.bare) + " -}}"
    own = "chat.system or " if prompt.system is None else ""
    before, after = template.head.split("{system}")
    return (
        "{%- set message = " + own + _text(message) + " -%}"
        "{{- (" + _text(before) + " + message + " + _text(after) + ") if message else " + _text(template.bare) + " -}}"
    )


def _own_system(prompt: Prompt) -> str:
    own = "chat.system or " if prompt.system is None else ""
    return (
        "{%- set message = " + own + _text(prompt.system or "") + " -%}"
        "{%- if message -%}{%- set chat.turns = [{'role': 'system', 'content': message}] + chat.turns -%}{%- endif -%}"
    )


def exact_template(prompt: Prompt, tokenizer: Any, picture: str, spec: ImageSpec | None) -> tuple[str, list[str]]:
    """Return the Jinja template with which transformers gives the run's token ids, and the dialogues where it does not.

    Ids can differ in later turns only: mmlab starts a new token at each end of an answer, transformers may merge it
    with what follows.

    Args:
        prompt: as for `jinja_template`.
        tokenizer: with the token `<image>` if the model reads pictures.
        picture: as for `jinja_template`.
        spec: with the number of the picture's tokens; None: the model reads only text.

    Raises:
        ConfigError: the ids of a single question differ.
    """
    best: tuple[str, list[str]] | None = None
    for join in _joins(tokenizer):
        text = jinja_template(prompt, tokenizer, picture, join)
        wrong = different_ids(prompt, tokenizer, tokenizer, text, spec)
        if best is None or len(wrong) < len(best[1]):
            best = text, wrong
        if not wrong:
            break
    assert best is not None
    if not set(best[1]) <= LATER:
        raise ConfigError(
            f"The run's prompts (template {prompt.template}) have other token ids in transformers, because of what its "
            "tokenizer adds to texts or how it splits them; such a run cannot be exported."
        )
    return best


def different_ids(prompt: Prompt, tokenizer: Any, theirs: Any, template: str, spec: ImageSpec | None) -> list[str]:
    """Return the dialogues, of one for each form that a prompt can have, for which transformers gives other ids.

    Args:
        prompt, spec: as for `exact_template`.
        tokenizer: of the run, with the token `<image>` if the model reads pictures.
        theirs: the tokenizer in transformers.
        template: Jinja.
    """
    probes = _probes(prompt, spec is not None)
    return [name for name, dialogue in probes if not _equal(dialogue, template, prompt, tokenizer, theirs, spec)]


def _joins(tokenizer: Any) -> Iterator[Join]:
    starts = ["", " "]
    if bos := leading_bos(tokenizer, ""):
        starts = [tokenizer.bos_token, tokenizer.bos_token + " ", ""]
        assert bos == [tokenizer.bos_token_id]
    for front, behind in product(starts, ("", " ")):
        yield Join(front, behind)


def _probes(prompt: Prompt, pictures: bool) -> Iterator[tuple[str, Dialogue]]:
    """(what it is, dialogue that ends with a question) for each form that a prompt can have."""
    mark = IMAGE if pictures else ""
    if prompt.template == "plain":
        yield "a question", [Turn("human", mark, images=int(pictures))]
        return
    joint = "\n" if pictures else ""
    for question in ("What is this?", "a b", "Écris 3 mots: \n\n- un"):
        yield "a question", [Turn("human", mark + joint + question, images=int(pictures))]
        if pictures:
            yield "a question without a picture", [Turn("human", question)]
    for name, answer in LATER_ANSWERS.items():
        later = [Turn("gpt", answer), Turn("human", "What else?")]
        yield name, [Turn("human", mark + joint + "Who?", images=int(pictures)), *later]


def _equal(
    dialogue: Dialogue, template: str, prompt: Prompt, tokenizer: Any, theirs: Any, spec: ImageSpec | None
) -> bool:
    try:
        segment = chat_prompt(dialogue, prompt, tokenizer, [spec.tokens] if spec else ())
    except SampleError:
        return True  # training has no form for it either
    ours = list(segment.input_ids)
    for start in segment.image_starts:
        ours[start : segment.shared] = [tokenizer.convert_tokens_to_ids(IMAGE)] * (segment.shared - start)
    return ours == chat_ids(messages_of(dialogue), template, theirs, spec.tokens if spec else 0)


def messages_of(dialogue: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of a dialogue, as transformers has them."""
    messages: list[dict[str, Any]] = []
    for turn in dialogue:
        content: Any = turn.text
        if turn.images:
            content = [{"type": "image"}, {"type": "text", "text": turn.text.removeprefix(IMAGE).removeprefix("\n")}]
        messages.append({"role": "user" if turn.role == "human" else "assistant", "content": content})
    return messages


def chat_ids(messages: list[dict[str, Any]], template: str, tokenizer: Any, tokens: int) -> list[int]:
    """The token ids of messages up to the place where the model speaks, as transformers' processors make them."""
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, **options)
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    if text.count(IMAGE) == 1:
        text = text.replace(IMAGE, IMAGE * tokens)
    return tokenizer(text, add_special_tokens=special)["input_ids"]
