"""An answer as it grows, token by token."""

from collections.abc import Generator
from queue import SimpleQueue
from threading import Event, Thread

from torch import Tensor

from mmlab.data.conversation import Segment
from mmlab.evaluate.answers import Answerer, Pictures


class _Stopped(Exception):
    """Ends a generation that was stopped."""


class _Tokens:
    """Takes tokens as `generate` makes them (its `streamer`), and sends the text so far."""

    def __init__(self, answerer: Answerer, texts: "SimpleQueue[str | BaseException | None]", *stops: Event):
        self.answerer, self.texts, self.stops = answerer, texts, stops
        self.ids: list[int] = []

    def put(self, ids: Tensor) -> None:
        if any(stop.is_set() for stop in self.stops):
            raise _Stopped
        self.ids += ids.flatten().tolist()  # the first ones are those of the prompt, none as it is embedded
        # The bytes of a character may be spread over tokens.
        self.texts.put(self.answerer.text(self.ids).removesuffix("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        pass


def streamed_answer(answerer: Answerer, prompt: Segment, pictures: Pictures, stop: Event) -> Generator[str, None, None]:
    """Yield the answer to a prompt each time it has grown; the last one is that of `Answerer.complete`.

    Args:
        answerer: asks the model, in another thread.
        prompt: of `Answerer.tokens`.
        pictures: that the prompt shows.
        stop: ends the answer where it is, once set.

    Raises:
        Exception: what generation raised.
    """
    texts: SimpleQueue[str | BaseException | None] = SimpleQueue()
    abandoned = Event()

    def generate() -> None:
        try:
            tokens = _Tokens(answerer, texts, stop, abandoned)
            texts.put(answerer.complete([prompt], [pictures], streamer=tokens)[0][0])
        except _Stopped:
            pass
        except BaseException as error:
            texts.put(error)
        finally:
            texts.put(None)

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        while (text := texts.get()) is not None:
            if isinstance(text, BaseException):
                raise text
            yield text
    finally:
        abandoned.set()
        thread.join()
