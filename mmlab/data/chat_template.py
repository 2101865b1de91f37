"""The chat template that comes with a tokenizer, with the spans of characters that the model learns to say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from mmlab.config.errors import ConfigError
from mmlab.data.clock import DATE, fix_clock
from mmlab.data.sample_types import SampleError
from mmlab.data.turns import Dialogue, NoSystem, Rendered, tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_RANDOM = re.compile(r"\|\s*random\b|\blipsum\b")


@dataclass(frozen=True)
class ChatTemplate:
    """The template that comes with the tokenizer (`tokenizer.apply_chat_template`).

    It has no input but the texts and `date`, an ISO date or date and time: a run must write the same prompts on every
    day and machine.

    Each text is first replaced with a mark that no template changes: what lies between the marks is the
    template's own, and then each text takes the place of its mark. The result must equal what the tokenizer
    renders itself.
    """

    date: str = DATE
    has_system: ClassVar[bool] = True  # which ones have is known when one is rendered

    def stop(self, tokenizer: "PreTrainedTokenizerBase") -> str:
        """The special token that follows an answer, usually the tokenizer's end of text.

        Raises:
            ConfigError: no chat template, or one that ends an answer without a special token.
        """
        return self._stop_in(self._frame(2, tokenizer, None)[-1], tokenizer)

    def render(
        self,
        dialogue: Dialogue,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        system: str | None,
        answer: bool,
    ) -> Rendered:
        """See `render`; with `system` None or empty, the chat template writes its own system message."""
        texts = [turn.text for turn in dialogue] if answer else [turn.text for turn in dialogue] + ["answer"]
        frame = self._frame(len(texts), tokenizer, system)
        texts = self._as_rendered(texts, frame, tokenizer, system)
        gap = self._gap(frame, tokenizer, system)
        rendered = Rendered(frame[0])
        for i, (text, after) in enumerate(zip(texts, frame[1:], strict=True)):
            if i % 2 == 0:
                first, *later = replace(dialogue[i], text=text).pieces
                rendered.say(first)
                for piece in later:
                    rendered.show()
                    rendered.say(piece)
                rendered.say(after.removesuffix(gap))
                continue
            if i == len(texts) - 1 and not answer:
                break
            stop = self._stop_in(after, tokenizer)
            learned = after[: after.index(stop) + len(stop)]
            rendered.learn((gap if frame[i].endswith(gap) else "") + text + learned)
            rendered.say(after[len(learned) :])
        return rendered

    def _apply(
        self,
        texts: Sequence[str],
        tokenizer: "PreTrainedTokenizerBase",
        system: str | None,
        prompt: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        if not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {tokenizer_name(tokenizer)} has no chat template; choose another prompt.template."
            )
        template = str(tokenizer.get_chat_template())
        if found := _RANDOM.search(template):
            raise ConfigError(
                f"The chat template of {tokenizer_name(tokenizer)} uses '{found[0]}', so it writes another prompt each "
                "time; choose another prompt.template."
            )
        try:
            text: Any = tokenizer.apply_chat_template(
                messages, chat_template=fix_clock(template, self.date), tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            if system:  # without one it has been rendered before, see `stop`
                raise NoSystem from error
            raise ConfigError(f"The chat template of {tokenizer_name(tokenizer)} failed: {error}.") from error
        return text

    def _frame(self, turns: int, tokenizer: "PreTrainedTokenizerBase", system: str | None) -> list[str]:
        """What the chat template writes before, between and after `turns` texts."""
        marks = [f"\ue000{i}\ue001" for i in range(turns)]
        rest, frame = self._apply(marks, tokenizer, system), []
        for mark in marks:
            before, separator, rest = rest.partition(mark)
            if not separator or mark in rest:
                raise ConfigError(
                    f"The chat template of {tokenizer_name(tokenizer)} does not write each message once and "
                    "in order, so labels cannot be placed; choose another prompt.template."
                )
            frame.append(before)
        return [*frame, rest]

    def _as_rendered(
        self, texts: list[str], frame: list[str], tokenizer: "PreTrainedTokenizerBase", system: str | None
    ) -> list[str]:
        """The texts as the chat template writes them: unchanged, or with questions, answers or both stripped."""
        whole = self._apply(texts, tokenizer, system)
        for strip in product((False, True), repeat=2):
            written = [text.strip() if strip[i % 2] else text for i, text in enumerate(texts)]
            if whole == frame[0] + "".join(a + b for a, b in zip(written, frame[1:], strict=True)):
                return written
        raise SampleError("template", "The tokenizer's chat template changes the texts of this dialogue.")

    def _gap(self, frame: list[str], tokenizer: "PreTrainedTokenizerBase", system: str | None) -> str:
        """White space between the generation prompt and an answer, which the model has to write."""
        marks = [f"\ue000{i}\ue001" for i in range(len(frame) - 2)]
        opened = self._apply(marks, tokenizer, system, prompt=True)
        until = "".join(a + b for a, b in zip(frame, marks, strict=False)) + frame[-2]
        gap = until[len(opened) :]
        return gap if until.startswith(opened) and gap.isspace() and frame[-2].endswith(gap) else ""

    def _stop_in(self, after: str, tokenizer: "PreTrainedTokenizerBase") -> str:
        added: Any = tokenizer.get_added_vocab  # its type is lost in the library's __getattr__
        special = {*tokenizer.all_special_tokens, *added()}
        stops = [token for token in special if token and after.lstrip().startswith(token)]
        if not stops:
            raise ConfigError(
                f"The chat template of {tokenizer_name(tokenizer)} ends an answer without a special token, "
                "so the model could not learn to stop; choose another prompt.template."
            )
        return max(stops, key=len)
