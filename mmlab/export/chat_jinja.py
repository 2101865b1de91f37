"""A run's prompt as a Jinja template, with which transformers' `apply_chat_template` gives the run's token ids.

Messages have the roles `system` (first), `user` and `assistant`; a content is a text, or a list of `text` and `image`.
The pictures of a message stand as training places them: a single one of a chat opens its message, followed by a line
break, and so do several without a text before or between them; others stay where the content has them.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlab.data.chat_template import ChatTemplate
from mmlab.data.clock import fix_clock
from mmlab.data.config import Prompt
from mmlab.data.conversation import leading_bos
from mmlab.data.templates import Template, template_named
from mmlab.runs.disk import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000answer\ue001"

# Collects `turns`, each with its text as `pieces` before, between and after pictures (`Turn.pieces`), the number of
# `pictures`, and `system`; raises for what training has no form for.
_READ = """{%- set chat = namespace(system='', turns=[], pictures=0) -%}
{%- for message in messages -%}
{%- set part = namespace(pieces=[''], inline=false, written=false) -%}
{%- set contents = message['content'] -%}
{%- if contents is string -%}
{%- set contents = [{'type': 'text', 'text': contents}] -%}
{%- endif -%}
{%- for content in contents -%}
{%- if content['type'] == 'text' -%}
{%- set part.pieces = part.pieces[:-1] + [part.pieces[-1] + content['text']] -%}
{%- set part.written = true -%}
{%- elif content['type'] in ('image', 'image_url') -%}
{%- set part.pieces = part.pieces + [''] -%}
{%- set part.inline = part.inline or part.written -%}
{%- else -%}
{{- raise_exception('The model reads text and pictures, not ' + content['type'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- if loop.first and message['role'] == 'system' -%}
{%- set chat.system = part.pieces | join | trim -%}
{%- else -%}
{%- if message['role'] != ('user', 'assistant')[chat.turns | length % 2] -%}
{{- raise_exception('The messages must alternate between user and assistant, user first.') -}}
{%- endif -%}
{%- if part.pieces | length > 1 and (message['role'] != 'user' or not @READS@) -%}
{{- raise_exception('@PICTURES@') -}}
{%- endif -%}
{%- set chat.pictures = chat.pictures + part.pieces | length - 1 -%}
{%- set chat.turns = chat.turns + [{'role': message['role'], 'pieces': part.pieces, 'inline': part.inline}] -%}
{%- endif -%}
{%- endfor -%}
{%- set placed = namespace(turns=[]) -%}
{%- for turn in chat.turns -%}
{%- set part = namespace(pieces=turn['pieces']) -%}
{%- if part.pieces | length > 1 and (chat.pictures == 1 or not turn['inline']) -%}
{%- set text = part.pieces | join -%}
{%- set part.pieces = [''] + ['\\n'] * (part.pieces | length - 2) + ['\\n' + text if text else ''] -%}
{%- endif -%}
{%- set placed.turns = placed.turns + [{'role': turn['role'], 'pieces': part.pieces}] -%}
{%- endfor -%}
{%- set chat.turns = placed.turns -%}
"""
_NO_SYSTEM = """{%- if @LOST@ -%}
{{- raise_exception('The model has no place for a system message.') -}}
{%- endif -%}
"""
_WRITE = """{{- @FRONT@ -}}
@SYSTEM@
{%- for turn in chat.turns -%}
{%- if turn['role'] == 'assistant' -%}
{{- @ANSWER@ + turn['pieces'][0] + @END@ -}}
{%- if loop.last -%}{{- @TAIL@ -}}{%- endif -%}
{%- else -%}
{%- if not loop.first -%}{{- @LATER@ -}}{%- endif -%}
{%- for piece in turn['pieces'] -%}
{%- if not loop.first -%}{{- @BEFORE@ + @PICTURE@ -}}{%- endif -%}
{%- set text = @PIECE@ -%}
{%- set ahead = text or @SPEAK@ -%}
{%- if not loop.first and (text or loop.last) -%}{{- @BEHIND@ -}}{%- endif -%}
{{- text -}}
{%- endfor -%}
{%- if add_generation_prompt or not loop.last -%}{{- @SPEAK@ -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
"""
# The tokenizer's own template as a macro. The model starts to speak where an answer begins, white space left to it.
_OWN = """{%- macro own(messages, add_generation_prompt) -%}{{ '' }}@OWN@{%- endmacro -%}
{%- set whole = namespace(turns=[]) -%}
{%- for turn in chat.turns -%}
{%- set part = namespace(text='') -%}
{%- for piece in turn['pieces'] -%}
{%- set ahead = piece -%}
{%- set part.text = part.text + ('' if loop.first else @PICTURE@) -%}
{%- set part.text = part.text + (@BEHIND@ if not loop.first and (piece or loop.last) else '') + piece -%}
{%- endfor -%}
{%- set whole.turns = whole.turns + [{'role': turn['role'], 'content': part.text}] -%}
{%- endfor -%}
{%- set chat.turns = whole.turns -%}
@SYSTEM@
{%- if add_generation_prompt -%}
{%- set until = own(chat.turns + [{'role': 'assistant', 'content': @MARK@}], false).split(@MARK@)[0] -%}
{%- set opened = own(chat.turns, true) -%}
{%- set text = opened if until.startswith(opened) and until[opened | length:].isspace() else until -%}
{%- else -%}
{%- set text = own(chat.turns, false) -%}
{%- endif -%}
{%- if text.startswith(@CUT@) -%}{%- set text = text[@CUT@ | length:] -%}{%- endif -%}
@DROPS@
{{- @FRONT@ + text -}}
"""


@dataclass(frozen=True)
class Join:
    """What is written so that transformers, which tokenizes a whole text, gives the same ids as mmlab, which tokenizes
    the text before, between and after pictures separately.

    Attributes:
        front: before the text, such as the beginning-of-text token.
        behind: after each picture that text follows.
        always: whether also in front of a text that begins with a space.
    """

    front: str = ""
    behind: str = ""
    always: bool = True


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
    bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
    refusal = "Only the user can show pictures." if picture else "The model reads no pictures."
    read = _READ.replace("@READS@", str(bool(picture)).lower()).replace("@PICTURES@", refusal)
    if isinstance(template, ChatTemplate):
        template.stop(tokenizer)  # refuses a tokenizer without a usable chat template
        own = fix_clock(str(tokenizer.get_chat_template()), prompt.date).removesuffix("\n")  # type: ignore[attr-defined]
        drops = _NO_SYSTEM.replace("@LOST@", "chat.system and chat.system not in text") if prompt.system is None else ""
        cut = bos if picture and leading_bos(tokenizer, "") else ""  # the processor adds it
        fields = {"OWN": own, "SYSTEM": _own_system(prompt), "MARK": _text(_MARK), "DROPS": drops, "CUT": _text(cut)}
        return _fill(read + _OWN, join, picture, fields)
    fields = {
        "SYSTEM": _system(template, prompt),
        "ANSWER": _text(template.answer),
        "END": _text(template.close + template.stop(tokenizer)),
        "TAIL": _text(template.tail),
        "LATER": _text(template.later.replace("{bos}", bos)),
        "BEFORE": _text(template.before),
        "PIECE": _piece(template),
        "SPEAK": _text(template.speak),
    }
    return _fill(read + _WRITE, join, picture, fields)


def _piece(template: Template) -> str:
    """What a template writes of a piece of a question, see `Template.render`."""
    if not template.asks:
        return "''"
    if template.behind is None:
        return "piece"
    rest = r"(piece[1:] if piece.startswith('\n') else piece)"
    return f"(piece if loop.first else {_text(template.behind)} + {rest})"


def _fill(text: str, join: Join, picture: str, fields: dict[str, str]) -> str:
    behind = _text(join.behind) if join.always else f"('' if ahead[:1] == ' ' else {_text(join.behind)})"
    fields |= {"FRONT": _text(join.front), "PICTURE": _text(picture), "BEHIND": behind}
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
