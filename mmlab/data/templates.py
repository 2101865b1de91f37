"""Conversation templates: turns become text, and the characters that the model learns to say are marked.

Labels follow from the marks alone. Nothing is searched in the text afterwards, so an answer may hold a
role name, a stop string or a picture marker. A learned span begins exactly where the prompt of inference
ends (`ASSISTANT:` in v1: the model says the space too) and ends after the template's stop.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError, nearest
from mmlab.data.chat_template import ChatTemplate
from mmlab.data.turns import IMAGE, Dialogue, Rendered, Writer, tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Template:
    """A template written down as strings, where `{system}`, `{bos}` and `{eos}` stand for what they name.

    Attributes:
        system: the published system message.
        head: from the start to the first question.
        bare: the same when there is no system message.
        later: from an answer's stop to the next question.
        speak: from a question to the place where the model speaks.
        answer: from that place to the answer; learned.
        close: between an answer and its stop; learned.
        end: the stop; learned.
        tail: after the last stop; not learned.
        asks: False where the question is thrown away and only the picture stays.
        before, behind: around the picture; `behind` None leaves the line break that a dialogue has there.
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

    def stop(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The string at which generation stops.

        Raises:
            ConfigError: the template needs the tokenizer's end of text, and there is none.
        """
        end = self.end
        if end == "\n" and not tokenizer(end, add_special_tokens=False)["input_ids"]:
            end = "{eos}"  # a tokenizer that drops line breaks (WordPiece) could never learn to stop
        if "{eos}" not in end:
            return end
        eos = tokenizer.eos_token
        if not isinstance(eos, str):
            raise ConfigError(
                f"The tokenizer {tokenizer_name(tokenizer)} has no eos_token, "
                "with which this prompt.template ends answers."
            )
        return end.replace("{eos}", eos)

    def render(
        self,
        dialogue: Dialogue,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        system: str | None,
        picture: bool,
        answer: bool,
    ) -> Rendered:
        """See `render`."""
        writer, stop = Writer(), self.stop(tokenizer)
        message = self.system if system is None else system
        bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
        writer.say(self.head.replace("{system}", message) if message else self.bare)
        for i, turn in enumerate(dialogue):
            if turn.role == "gpt":
                writer.learn(self.answer + turn.text + self.close + stop)
                continue
            here = picture and i == 0
            if i > 0:
                writer.say(self.later.replace("{bos}", bos))
            writer.say(self.before if here else "")
            writer.ask(self._question(turn.text, here), here)
            writer.say(self.speak)
        if answer:
            writer.say(self.tail)
        return writer.done()

    def _question(self, text: str, picture: bool) -> str:
        """What stands for a question that opens with a picture, or for one without."""
        if not self.asks:
            return IMAGE if picture else ""
        if not picture or self.behind is None:
            return text
        return IMAGE + self.behind + text.removeprefix(IMAGE).removeprefix("\n")


_ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {user}'s questions."
_CHAT = "A chat between a curious {user} and an artificial intelligence assistant. " + _ASSISTANT

TEMPLATES: dict[str, Template | ChatTemplate] = {
    # LLaVA's stage 1: picture, caption, line break.
    "plain": Template(end="\n", asks=False),
    # LLaVA v1's training code; the stop of an answer is also the mark of the next turn.
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
    # ChatML as LLaVA-NeXT writes it for Qwen.
    "chatml": Template(
        system="You are a helpful assistant.",
        head="<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n",
        bare="<|im_start|>user\n",
        later="\n<|im_start|>user\n",
        speak="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        tail="\n",
    ),
    # MiniGPT-4 on Vicuna v0 (its training code). It tokenises the answer by itself, and Llama's tokenizer puts a
    # space before each text: two of them part question and answer. The stop is also the mark of the next turn.
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
    if name not in TEMPLATES:
        raise ConfigError(f"prompt.template '{name}' is not one of {', '.join(TEMPLATES)}.{nearest(name, TEMPLATES)}")
    return TEMPLATES[name]
