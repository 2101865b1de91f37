"""From a dialogue to text, and from text to token ids with labels."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from mmlab.config.errors import ConfigError
from mmlab.data.batch import IGNORE
from mmlab.data.chat_template import ChatTemplate
from mmlab.data.config import Prompt
from mmlab.data.sample_types import SampleError
from mmlab.data.templates import template_named
from mmlab.data.turns import Dialogue, NoSystem, Rendered, tokenizer_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = list[tuple[int, int, int]]
"""Id, first character, end character of each token; the bytes of an emoji share a character."""

_ANCHORS = (":", "\n", "a")
_WINDOW = 64  # characters around a cut that can change the tokens beside it


@dataclass(frozen=True)
class Segment:
    """Tokens that see one another.

    Attributes:
        input_ids: ids; the pad id at the places of images.
        labels: the id where there is loss, else `IGNORE`.
        image_starts: the first place of each image.
        shared: tokens up to and including the last image's last place, 0 without an image.
        turns_dropped: pairs of question and answer that did not fit.
    """

    input_ids: list[int]
    labels: list[int]
    image_starts: list[int] = field(default_factory=list)
    shared: int = 0
    turns_dropped: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


def render(dialogue: Dialogue, prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", answer: bool = True) -> Rendered:
    """The dialogue as text; with `answer` False it ends with a question, and the text ends where the model speaks.

    The dialogue's own system message is used unless the prompt has one.

    Raises:
        ConfigError: the tokenizer lacks a token or chat template that the prompt's template needs.
        SampleError: `order` for turns that do not alternate, `template` if a chat template changes them, `system` if
            the template has no place for the dialogue's system message.
    """
    roles = [turn.role for turn in dialogue]
    if not roles or roles != (["human", "gpt"] * len(roles))[: len(roles)] or (roles[-1] == "gpt") != answer:
        raise SampleError("order", "The turns do not alternate between human and gpt, human first.")
    template = template_named(prompt.template)
    if isinstance(template, ChatTemplate):
        template = ChatTemplate(prompt.date)
    own = dialogue[0].system if prompt.system is None else None
    try:
        rendered = template.render(dialogue, tokenizer, system=own or prompt.system, answer=answer)
    except NoSystem:
        if own is None:
            raise
        rendered = Rendered()
    if own is not None and own not in rendered.text:  # some chat templates drop it
        message = f"prompt.template={prompt.template} has no place for the conversation's system message; leave it out"
        raise SampleError("system", f"{message} with prompt.system=''.")
    return rendered


def encode(
    dialogue: Dialogue,
    prompt: Prompt,
    tokenizer: "PreTrainedTokenizerBase",
    pictures: Sequence[int] = (),
    max_length: int | None = None,
) -> Segment:
    """Token ids and labels of a dialogue that ends with an answer.

    Text before and after a picture is tokenized separately, as LLaVA does; the beginning-of-text id comes once. A
    dialogue longer than `max_length`, image tokens included, loses its last turns, never a part of one.

    Args:
        dialogue, prompt, tokenizer: as for `render`.
        pictures: number of places that each of the sample's pictures takes, in order.
        max_length: of the tokens; None: any.

    Raises:
        ConfigError: a tokenizer without offsets, or a dialogue that shows more pictures than `pictures` has.
        SampleError: `too-long` if not even the first question and answer fit, `no-loss`; see `render`.
    """
    pairs = keep = len(dialogue) // 2
    segment, ends = _encode(render(dialogue, prompt, tokenizer), prompt, tokenizer, pictures)
    if max_length is not None and len(segment) > max_length:
        keep = min(keep - 1, sum(end <= max_length for end in ends))
        while keep:
            segment, _ = _encode(render(dialogue[: 2 * keep], prompt, tokenizer), prompt, tokenizer, pictures)
            if len(segment) <= max_length:
                break
            keep -= 1
        else:
            raise SampleError("too-long", f"The first question and answer take more than {max_length} tokens.")
    if all(label == IGNORE for label in segment.labels):
        raise SampleError("no-loss", "The dialogue has no supervised token.")
    return replace(segment, turns_dropped=pairs - keep)


def asking(prompt: Prompt, template: str | None = None) -> Prompt:
    """The prompt for questions to a model that was trained with `prompt`.

    Args:
        prompt: of the training.
        template: in place of its template.

    Raises:
        ConfigError: the template has no questions.
    """
    asks = replace(prompt, pictures="tokens", turns="questions", template=template or prompt.template)
    if asks.template == "plain":
        example = "minigpt4" if asks.requests == "minigpt4" else "v1"
        raise ConfigError(
            "The run was trained on captions (template plain), which has no questions; choose a template that its "
            f"language model was trained with, such as template={example}."
        )
    return asks


def chat_prompt(
    dialogue: Dialogue, prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", pictures: Sequence[int] = ()
) -> Segment:
    """Token ids of a dialogue that ends with a question, up to the place where the model speaks.

    They are a strict prefix of the ids that `encode` returns for the dialogue with its answer.

    Raises:
        ConfigError, SampleError: as `encode`.
    """
    segment, _ = _encode(render(dialogue, prompt, tokenizer, answer=False), prompt, tokenizer, pictures)
    return replace(segment, labels=[IGNORE] * len(segment))


def _encode(
    rendered: Rendered, prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", pictures: Sequence[int]
) -> tuple[Segment, list[int]]:
    """The tokens of a text, and the number of tokens up to and including each answer's stop."""
    check_tokenizer(tokenizer)
    if len(rendered.images) > (able := sum(tokens > 0 for tokens in pictures)):
        raise ConfigError(f"The dialogue shows {len(rendered.images)} images, but the model has tokens for {able}.")
    text, spans, bos = rendered.text, rendered.spans, tokenizer.bos_token_id
    ids = leading_bos(tokenizer, text)
    labels, places, starts, shared, at = [IGNORE] * len(ids), [-1] * len(ids), [], 0, 0
    for n, (stop, resume) in enumerate([*rendered.images, (len(text), len(text))]):
        inside = [(max(a, at) - at, min(b, stop) - at) for a, b in spans if a < stop and b > at]
        span = 0
        for token, a, b in tokenize(text[at:stop], inside, tokenizer):
            while span < len(inside) and inside[span][1] <= a:
                span += 1
            every = prompt.supervise == "all" and (token != bos or bos == tokenizer.eos_token_id)
            ids.append(token)
            labels.append(token if every or (span < len(inside) and inside[span][0] < b) else IGNORE)
            places.append(at + a)
        if n < len(rendered.images):
            starts.append(len(ids))
            ids += [pad_id(tokenizer)] * pictures[n]
            labels += [IGNORE] * pictures[n]
            places += [stop] * pictures[n]
            shared = len(ids)
        at = resume
    ends = [bisect_left(places, end) for _, end in spans]
    return Segment(ids, labels, starts, shared), ends


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ConfigError for a tokenizer without character offsets, which only fast ones have."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"The tokenizer {tokenizer_name(tokenizer)} is not a fast one and has no character offsets, "
            "which labels need; load its fast version."
        )


def check_vocabulary(ids: Iterable[int], vocabulary: int | None, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise SampleError `vocabulary` for a token that a model with so many tokens has no embedding of."""
    if vocabulary is not None and (largest := max(ids, default=0)) >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise SampleError("vocabulary", f"The model has {vocabulary} tokens, and '{token}' is not one of them.")


def leading_bos(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The beginning-of-text id, if the tokenizer adds one and `text` does not contain it."""
    bos: int | None = tokenizer.bos_token_id  # type: ignore[assignment]
    if bos is None or text.startswith(str(tokenizer.bos_token)):
        return []
    return [bos] if tokenizer.backend_tokenizer.encode("a").ids[:1] == [bos] else []  # type: ignore[attr-defined]


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id at places without text: of padding, or else of the end of text, or else 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if isinstance(i, int))


def tokenize(text: str, spans: list[tuple[int, int]], tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokenize `text` so that no token lies partly inside a span.

    The text is tokenized as a whole, as at inference. It is cut only at the start of a span if the text before
    it has other tokens on its own (the prompt of inference would then not be a prefix of the training
    sequence), and at the end of a span that shares a token with the text after it.
    """
    tokens = _tokens(text, tokenizer)
    starts = [start for start, _ in spans if 0 < start < len(text)]
    cuts = [start for start in starts if _across(start, tokens) or _regrouped(text, start, tokenizer)]
    cuts += [end for _, end in spans if text[end : _across(end, tokens)].strip()]
    if not cuts:
        return tokens
    edges = [0, *sorted(set(cuts)), len(text)]
    tokens = _tokens(text[: edges[1]], tokenizer)
    for start, end in pairwise(edges[1:]):
        tokens += [(i, start + a, start + b) for i, a, b in _continued(text[start:end], tokenizer)]
    return tokens


def _tokens(text: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    # The tokenizer below transformers' wrapper: a call to the wrapper takes five times as long.
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]
    return [(i, a, b) for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)]


def _across(cut: int, tokens: Tokens) -> int:
    """The end of the token that begins before `cut` and ends after it; 0 if there is none."""
    before = bisect_left(tokens, cut, key=lambda token: token[1])
    end = tokens[before - 1][2] if before else 0
    return end if end > cut else 0


def _regrouped(text: str, cut: int, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokens before `cut` depend on the text after it, as only those of white space do."""
    if not text[cut - 1].isspace():
        return False
    left = max(0, cut - _WINDOW)
    within = _tokens(text[left : cut + _WINDOW], tokenizer)
    alone = _tokens(text[left:cut], tokenizer)
    return [i for i, a, _ in within if a < cut - left] != [i for i, _, _ in alone]


def _continued(piece: str, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Tokens of a piece from the middle of a text, without the space that some tokenizers put first."""
    for anchor in _ANCHORS:
        tokens, n = _tokens(anchor + piece, tokenizer), len(anchor)
        if all(b <= n or a >= n for _, a, b in tokens):
            return [(i, a - n, b - n) for i, a, b in tokens if a >= n]
    return _tokens(piece, tokenizer)
