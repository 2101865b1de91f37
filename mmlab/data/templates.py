"""Conversation templates: turns become text with the spans of characters that the model learns to say.

Labels follow from these spans alone. The text is never searched afterwards, so an answer may contain a
role name, a stop string or an image marker. A learned span begins exactly where the prompt of inference
ends (`ASSISTANT:` in v1: the model also says the space) and ends after the template's stop.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError
from mmlab.config.fields import check_value
from mmlab.data.chat_template import ChatTemplate
from mmlab.data.turns import Dialogue, NoSystem, Rendered, tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """A template as strings with the fields `{system}`, `{bos}` and `{eos}`.

    Attributes:
        system: the published system message.
        head: from the start to the first question.
        bare: the same without a system message.
        later: from an answer's stop to the next question.
        speak: from a question to the place where the model speaks.
        answer: from that place to the answer; learned.
        close: between an answer and its stop; learned.
        end: the stop; learned.
        tail: after the last stop; not learned.
        asks: False drops the question and keeps only the image.
        before, behind: around an image; `behind` None keeps the line break that a dialogue has there.
    """

    system: str = ""
    head: str = ""
    bare: str = ""
    later: str = ""
    speak: str = ""
    answer: str = ""
    close: str = ""
    end: str = "{eos}"
    tail: str = ""
    asks: bool = True
    before: str = ""
    behind: str | None = None

    @property
    def has_system(self) -> bool:
        """Whether there is a place for a system message."""
        return "{system}" in self.head

    def stop(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The string at which generation stops.

        Raises:
            ConfigError: the template needs the tokenizer's end of text, but it has none.
        """
        end = self.end
        if end == "\n" and not tokenizer(end, add_special_tokens=False)["input_ids"]:
            end = "{eos}"  # a tokenizer that drops line breaks (WordPiece) could never learn to stop
        if "{eos}" not in end:
            return end
        eos = tokenizer.eos_token
        if not isinstance(eos, str):
            raise ConfigError(
                f"The tokenizer {tokenizer_name(tokenizer)} has no eos_token, which this prompt.template needs"
                " to end answers."
            )
        return end.replace("{eos}", eos)

    def render(
        self,
        dialogue: Dialogue,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        system: str | None,
        answer: bool,
    ) -> Rendered:
        """See `render`."""
        rendered, stop = Rendered(), self.stop(tokenizer)
        message = self.system if system is None else system
        if message and not self.has_system:
            raise NoSystem
        bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
        rendered.say(self.head.replace("{system}", message) if message else self.bare)
        for i, turn in enumerate(dialogue):
            if turn.role == "gpt":
                rendered.learn(self.answer + turn.text + self.close + stop)
                continue
            if i > 0:
                rendered.say(self.later.replace("{bos}", bos))
            self._ask(rendered, turn.pieces)
            rendered.say(self.speak)
        if answer:
            rendered.say(self.tail)
        return rendered

    def _ask(self, rendered: Rendered, pieces: list[str]) -> None:
        """Write a question, with pictures between its pieces."""
        rendered.say(pieces[0] if self.asks else "")
        for piece in pieces[1:]:
            rendered.say(self.before)
            rendered.show()
            if self.asks:
                rendered.say(piece if self.behind is None else self.behind + piece.removeprefix("\n"))


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
_CHAT = "A chat between a curious {user} and an artificial intelligence assistant. " + _ASSISTANT

TEMPLATES: dict[str, Template | ChatTemplate] = {
    # LLaVA's stage 1: image, caption, line break.
    "plain": Template(end="\n", asks=False),
    # LLaVA v1's training code; the stop of an answer also opens the next turn.
    "v0": Template(
        system=_CHAT.replace("{user}", "human"),
        head="{system}\n\n### Human: ",
        bare="### Human: ",
        later=" Human: ",
        speak="\n### Assistant:",
        answer=" ",
        close="\n",
        end="###",
        tail=" ",
    ),
    # Vicuna v1.1, LLaVA-1.5.
    "v1": Template(
        system=_CHAT.replace("{user}", "user"),
        head="{system} USER: ",
        bare="USER: ",
        later="USER: ",
        speak=" ASSISTANT:",
        answer=" ",
    ),
    # LLaVA on Llama-2-chat.
    "llama_2": Template(
        system="You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.",
        head="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        bare="[INST] ",
        later="{bos}[INST] ",
        speak=" [/INST]",
        answer=" ",
        close=" ",
    ),
    # LLaVA-NeXT on Mistral-Instruct (`mistral_instruct`): as `llama_2`, without a system message or a second start.
    "mistral": Template(bare="[INST] ", later="[INST] ", speak=" [/INST]", answer=" ", close=" "),
    # ChatML, as LLaVA-NeXT writes it for Qwen.
    "chatml": Template(
        system="You are a helpful assistant.",
        head="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
        bare="<|im_start|>user\n",
        later="\n<|im_start|>user\n",
        speak="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        tail="\n",
    ),
    # MiniGPT-4 on Vicuna v0 (its training code). It tokenizes the answer separately, and Llama's tokenizer puts a
    # space before each text: two spaces separate question and answer. The stop also opens the next turn.
    "minigpt4": Template(
        bare="###Human: ",
        later="Human: ",
        speak=" ###Assistant: ",
        answer=" ",
        end="###",
        before="<Img>",
        behind="</Img> ",
    ),
    # MiniGPT-4 on Llama-2-chat.
    "minigpt4_llama_2": Template(
        bare="[INST] ",
        later="{bos}[INST] ",
        speak=" [/INST] ",
        answer=" ",
        before="<Img>",
        behind="</Img> ",
    ),
    "tokenizer": ChatTemplate(),
}


def template_named(name: str) -> Template | ChatTemplate:
    """The template of that name.

    Raises:
        ConfigError: there is none.
    """
    check_value("prompt.template", name, {"choices": tuple(TEMPLATES)})
    return TEMPLATES[name]
