"""The page of vision-language runs: a chat about pictures, with one run or two side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mmlab.config.errors import UserError
from mmlab.data.sample_types import SampleError
from mmlab.demo.page import AT_ONCE, GENERATES, Handlers, blocks, warn
from mmlab.demo.serving import take_uploads
from mmlab.demo.talks import Speaker, Talk, TalkVisit
from mmlab.demo.visits import Visits
from mmlab.evaluate.answers import Answerer

PICTURES = [".jpg", ".jpeg", ".png", ".webp"]


class ChatHandlers(Handlers[TalkVisit]):
    """What happens when a visitor sends, stops, regenerates or clears.

    Each answer to the page has the value of the question's box, the messages of each run, and the prompt of each.

    Args:
        speakers: the runs.
        root: the folder of the visitors' folders.
    """

    def __init__(self, speakers: Sequence[Speaker], root: Path):
        super().__init__(Visits(root, lambda folder: TalkVisit(folder, talks=[Talk() for _ in speakers])))
        self.speakers = speakers

    def send(
        self, message: dict[str, Any], temperature: float, max_new_tokens: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Ask a question about the pictures that come with it and those before."""
        visit, answerers = self._start(request, temperature, max_new_tokens)
        try:
            visit.ask(answerers, message["text"].strip(), take_uploads(message["files"]))
        except SampleError as error:
            warn(f"The question cannot be asked: {error}")
            yield [{"text": message["text"], "files": []}, *self._skipped()]
            return
        yield from self._answer(visit, answerers)

    def regenerate(self, temperature: float, max_new_tokens: int, request: gr.Request) -> Iterator[list[Any]]:
        """Answer the last question again."""
        visit, answerers = self._start(request, temperature, max_new_tokens)
        if not visit.asked:
            warn("There is no question yet.")
            yield [gr.skip(), *self._skipped()]
            return
        visit.retract()
        yield from self._answer(visit, answerers)

    def clear(self, request: gr.Request) -> list[Any]:
        """Forget the chat."""
        self.visits.of(str(request.session_hash)).clear()
        return [None, *([] for _ in self.speakers), *("" for _ in self.speakers)]

    def _start(self, request: gr.Request, temperature: float, max_new_tokens: int) -> tuple[TalkVisit, list[Answerer]]:
        visit = self.visits.start(str(request.session_hash))
        return visit, [speaker.answerer(max_new_tokens, temperature) for speaker in self.speakers]

    def _skipped(self) -> list[Any]:
        return [gr.skip() for _ in range(2 * len(self.speakers))]

    def _answer(self, visit: TalkVisit, answerers: Sequence[Answerer]) -> Iterator[list[Any]]:
        def messages(texts: Sequence[str]) -> list[Any]:
            return [visit.messages(n, text) for n, text in enumerate(texts)]

        yield [None, *messages([""] * len(answerers)), *visit.prompts(answerers)]
        unchanged = [gr.skip() for _ in answerers]
        try:
            for texts in visit.answer(answerers):
                yield [gr.skip(), *messages(texts), *unchanged]
        except UserError as error:
            warn(str(error))


def chat_page(speakers: Sequence[Speaker], root: Path, max_new_tokens: int) -> tuple[gr.Blocks, Visits]:
    """The page of a chat with some runs, and its visitors.

    Args:
        speakers: the runs.
        root: the folder of the visitors' folders.
        max_new_tokens: of an answer, at first.
    """
    handlers = ChatHandlers(speakers, root)
    sees = all(speaker.sees for speaker in speakers)  # the others would answer without the picture
    with blocks([speaker.name for speaker in speakers]) as page:
        with gr.Row():
            chats = [
                gr.Chatbot(label=speaker.name, height=420, render_markdown=False, buttons=[]) for speaker in speakers
            ]
        box = gr.MultimodalTextbox(
            label="Question",
            show_label=False,
            placeholder="A question, with or without pictures" if sees else "A question",
            sources=["upload"] if sees else [],
            file_types=PICTURES,
            file_count="multiple",
            max_plain_text_length=100_000,
            elem_classes="asked",
        )
        with gr.Row():
            stop, again, clear = (gr.Button(name, size="sm") for name in ("Stop", "Regenerate", "Clear"))
        with gr.Row():
            temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the most likely token")
            most = max(1024, max_new_tokens)
            longest = gr.Slider(1, most, max_new_tokens, step=1, label="Max new tokens", elem_classes="longest")
        with gr.Accordion("The prompt as sent", open=False), gr.Row():
            prompts = [
                gr.Textbox(label=speaker.name, lines=4, max_lines=20, interactive=False, elem_classes="sent")
                for speaker in speakers
            ]
        shown = [box, *chats, *prompts]
        box.submit(handlers.send, [box, temperature, longest], shown, show_progress="hidden", **GENERATES)
        again.click(handlers.regenerate, [temperature, longest], shown, show_progress="hidden", **GENERATES)
        stop.click(handlers.stop, **AT_ONCE)
        cleared = gr.on([clear.click, *(chat.clear for chat in chats)], handlers.stop, **AT_ONCE)
        cleared.then(handlers.clear, None, shown, show_progress="hidden", **GENERATES)
        page.unload(handlers.leave)
    return page, handlers.visits
