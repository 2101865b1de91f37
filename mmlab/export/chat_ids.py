"""Compares the token ids of a run's prompts with those that transformers makes of the same messages."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import chat_prompt, leading_bos
from mmlab.data.sample_types import ImageSpec, SampleError
from mmlab.data.turns import IMAGE, Dialogue, Turn
from mmlab.export.chat_jinja import Join, jinja_template

LATER_ANSWERS = {
    f"a later turn after the answer {answer!r}": answer for answer in ("Yes.", "A red square", "1 + 1 = 2")
}
LATER = LATER_ANSWERS.keys()
SEVERAL = {
    "two pictures before a question": [Turn("human", f"{IMAGE}\n{IMAGE}\nWhat changed?", images=2)],
    "two pictures within a question": [Turn("human", f"Is {IMAGE} larger than {IMAGE}\n or not?", images=2)],
    "a picture in each of two turns": [
        Turn("human", f"{IMAGE}\nWho?", images=1),
        Turn("gpt", "Yes."),
        Turn("human", f"{IMAGE}\nAnd here?", images=1),
    ],
}
INEXACT = LATER | SEVERAL.keys()
"""Forms of dialogues that a run can be exported without; others have to have the same token ids."""


def exact_template(prompt: Prompt, tokenizer: Any, picture: str, spec: ImageSpec | None) -> tuple[str, list[str]]:
    """Return the Jinja template with which transformers gives the run's token ids, and the dialogues where it does not.

    Ids can differ only in dialogues with later turns, as mmlab starts a new token at each end of an answer and
    transformers may merge it with what follows, and in those that show several pictures.

    Args:
        prompt: as for `jinja_template`.
        tokenizer: with the token `<image>` if the model reads pictures.
        picture: as for `jinja_template`.
        spec: with the number of the picture's tokens; None: the model reads only text.

    Raises:
        ConfigError: the ids of a single question differ.
    """
    best: tuple[str, list[str]] | None = None
    for join in _joins(tokenizer, spec is not None):
        text = jinja_template(prompt, tokenizer, picture, join)
        wrong = different_ids(prompt, tokenizer, tokenizer, text, spec)
        if best is None or len(wrong) < len(best[1]):
            best = text, wrong
        if not wrong:
            break
    assert best is not None
    if not set(best[1]) <= INEXACT:
        raise ConfigError(
            f"The run's prompts (template {prompt.template}) have other token ids in transformers, because of what its "
            "tokenizer adds to texts or how it splits them; such a run cannot be exported."
        )
    return best


def writes_bos(template: str, tokenizer: Any) -> bool:
    """Whether a template writes the BOS token that the tokenizer also adds.

    Tokenizing the rendered text then gives two of them; `apply_chat_template(tokenize=True)` avoids that.
    """
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    return bool(leading_bos(tokenizer, "")) and text.startswith(tokenizer.bos_token)


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


def _joins(tokenizer: Any, pictures: bool) -> Iterator[Join]:
    starts = ["", " "]
    if bos := leading_bos(tokenizer, ""):
        starts = [tokenizer.bos_token, tokenizer.bos_token + " "]
        # A processor adds the token when it tokenizes the rendered text; a tokenizer's `apply_chat_template` does not.
        starts.insert(0 if pictures else 2, "")
        assert bos == [tokenizer.bos_token_id]
    for front, (behind, always) in product(starts, (("", True), (" ", True), (" ", False))):
        yield Join(front, behind, always)


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
    if pictures:
        yield from SEVERAL.items()


def _equal(
    dialogue: Dialogue, template: str, prompt: Prompt, tokenizer: Any, theirs: Any, spec: ImageSpec | None
) -> bool:
    tokens = spec.tokens if spec else 0
    try:
        segment = chat_prompt(dialogue, prompt, tokenizer, [tokens] * sum(turn.images for turn in dialogue))
    except SampleError:
        return True  # training has no form for it either
    ours = list(segment.input_ids)
    for start in segment.image_starts:
        ours[start : start + tokens] = [tokenizer.convert_tokens_to_ids(IMAGE)] * tokens
    return ours == chat_ids(messages_of(dialogue), template, theirs, tokens)


def messages_of(dialogue: Sequence[Turn]) -> list[dict[str, Any]]:
    """The messages of a dialogue, as transformers has them."""
    messages: list[dict[str, Any]] = []
    for turn in dialogue:
        role = "user" if turn.role == "human" else "assistant"
        messages.append({"role": role, "content": _content(turn) if turn.images else turn.text})
    return messages


def _content(turn: Turn) -> list[dict[str, str]]:
    """Pictures and texts of a turn. A text before the first picture, even an empty one, keeps pictures in place."""
    first, *between, last = turn.pieces
    if not first and all(piece == "\n" for piece in between) and last != "\n" and last[:1] in ("", "\n"):
        texts = [{"type": "text", "text": last[1:]}] if last else []
        return [{"type": "image"} for _ in range(turn.images)] + texts
    content = [{"type": "text", "text": first}]
    for piece in (*between, last):
        content += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
    return content


def chat_ids(messages: list[dict[str, Any]], template: str, tokenizer: Any, tokens: int) -> list[int]:
    """The token ids of messages up to the place where the model speaks, as transformers' processors make them."""
    options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
    text = tokenizer.apply_chat_template(messages, **options)
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    if tokens:
        text = text.replace(IMAGE, IMAGE * tokens)
    return tokenizer(text, add_special_tokens=special)["input_ids"]
