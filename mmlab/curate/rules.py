"""Rules that catch faulty texts of a language model, counted by their names.

MiniGPT-4 (arXiv 2304.10592, §3.2) hard-codes a rule for apologies and leaves the rest to a person; the other rules
cover the faults of the first stage that its §3.2 lists: repetition, fragments, text that is not English. The last four
are for LLaVA's data: the model reads a description of the image, but has to write as if it saw the image.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from mmlab.config.errors import ConfigError, nearest

Rule = Callable[[str], bool]
"""Whether a text is caught."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_QUOTED = re.compile(r"“[^”]*”|\"[^\"]*\"|«[^»]*»")
_QUOTE = re.compile(r'(?<!\d)"')  # after a number it stands for inches
_SENTENCE_END = re.compile(r"([.!?][\"”’')\]]*)\s+")


def caught_by(text: str, rules: Sequence[str]) -> list[str]:
    """The names of the rules that catch a text, in order; an empty text is only caught by `empty`."""
    if "empty" in rules and empty(text):
        return ["empty"]
    return [name for name in rules if RULES[name](text)]


def check_rules(names: Sequence[str]) -> None:
    """Raise ConfigError unless every name is in `RULES`."""
    for name in names:
        if name not in RULES:
            raise ConfigError(f"There is no rule '{name}'.{nearest(name, RULES)} Rules: {', '.join(RULES)}.")


def empty(text: str) -> bool:
    """The text has no word."""
    return not _WORD.search(text)


def repeats(text: str) -> bool:
    """A word or pair three times in a row, a longer phrase twice, or a repeated sentence or 1/3 of the 4-grams."""
    words = _words(text)
    # "Side by side by side" is English: a pair may occur twice in a row.
    if any(_running(words, size) >= (3 if size < 3 else 2) for size in range(1, 13)):
        return True
    sentences = [tuple(_words(sentence)) for sentence in sentences_of(text)]
    long = [sentence for sentence in sentences if len(sentence) > 2]
    grams = list(zip(*(words[i:] for i in range(4)), strict=False))
    return len(set(long)) < len(long) or (len(grams) >= 12 and 3 * len(set(grams)) < 2 * len(grams))


def unfinished(text: str) -> bool:
    """The end is no end of a sentence, an ellipsis or a dangling word, or a quote or bracket is not closed."""
    bare = text.rstrip().rstrip("\"”’')]»")
    if not bare.endswith((".", "!", "?")) or bare.endswith(".."):
        return True
    if any(text.count(left) != text.count(right) for left, right in ("()", "“”")) or len(_QUOTE.findall(text)) % 2:
        return True
    last = bare.rstrip(".!?").rsplit(maxsplit=1)[-1:]
    return (bool(last) and last[0] in _DANGLING) or bare.lower().endswith(_ABBREVIATIONS)


def apology(text: str) -> bool:
    """The model refers to itself: it is sorry, mistaken or a language model, or cannot see an image."""
    return bool(_APOLOGY.search(_unquoted(text)))


def explanation(text: str) -> bool:
    """The model refers to its task, which the prompt forbids: "Here is the corrected paragraph"."""
    return bool(_EXPLANATION.search(_unquoted(text)))


def symbols(text: str) -> bool:
    """Control and replacement characters, markup, role names, or repeated punctuation."""
    if _MARKUP.search(text):
        return True
    return any(unicodedata.category(sign) in _STRAY and sign not in _ALLOWED for sign in text)


def language(text: str) -> bool:
    """A sentence in another script, or in Spanish, French, German, Italian, Portuguese or Dutch by its function words.

    A text of at least 20 words is also caught if less than 15 % are English function words (40 % are usual). Quoted
    text is ignored.
    """
    bare = _unquoted(text)
    words = _words(bare)
    if len(words) >= 20 and sum(word in _ENGLISH for word in words) < 0.15 * len(words):
        return True
    return any(_is_foreign(sentence) for sentence in sentences_of(bare))


def caption(text: str) -> bool:
    """Refers to the captions; "a caption" as part of an image passes."""
    return bool(_CAPTION.search(_unquoted(text)))


def description(text: str) -> bool:
    """Refers to the given description or sentences, or announces a description."""
    return bool(_DESCRIPTION.search(_unquoted(text)))


def coordinates(text: str) -> bool:
    """Mentions bounding boxes or coordinates, or contains their numbers."""
    return bool(_COORDINATES.search(_unquoted(text)))


def information(text: str) -> bool:
    """Refers to information that is provided, given or not mentioned, as nobody does who sees the image."""
    return bool(_INFORMATION.search(_unquoted(text)))


def sentences_of(text: str) -> list[str]:
    """Split at line breaks and at the ends of sentences; "Mr. Smith" is split as well, which affects no rule."""
    return [sentence for sentence in _SENTENCE_END.sub(r"\1\n", text).split("\n") if sentence.strip()]


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(empty, repeats, unfinished, apology, explanation, symbols, language),
        *(caption, description, coordinates, information),
    )
}

_DANGLING = {"a", "an", "the", "and", "or", "but", "because", "The", "And", "Or", "But", "An"}  # "A" may be a letter
_ABBREVIATIONS = (" mr.", " mrs.", " ms.", " dr.", " e.g.", " i.e.", " vs.", "(e.g.", "(i.e.")
_APOLOGY = re.compile(
    r"\b(?:i['’]m|i am|we['’]re|we are) (?:\w+ )?sorry\b|^sorry\b"
    r"|\bi (?:\w+ )?apologi[sz]e\b|\bmy apolog(?:y|ies)\b|\bapologies for\b"
    r"|\bi (?:have )?made a(?:n error| mistake)\b"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bi(?: can(?:no|['’])t|(?: am|['’]m) (?:not able|unable) to| do(?:n['’]t| not))"
    r" (?:\w+ )?(?:see|view|have access)\b",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"^\W*(?:sure|certainly|of course)\b[,!.:]"
    r"|^\W*here(?:['’]s| is) (?:the|a|your|my) (?:\w+ )?(?:paragraph|text|version|description)\b"
    r"|\b(?:corrected|revised|rewritten) (?:paragraph|text|version|description)\b"
    r"|\bparagraph is (?:already |grammatically )*correct\b"
    r"|\bno (?:corrections?|changes?) (?:(?:is|are|was|were) )?(?:needed|necessary|required|made)\b",
    re.IGNORECASE,
)
_SOURCE = r"(?:the|this|these|those|each|every|all|both|your)(?: of the)?"
_GIVEN = r"(?:provided|given|supplied|above|following|original|first|second|third|fourth|fifth|five|image|text|written)"
_CAPTION = re.compile(
    rf"\b{_SOURCE} (?:{_GIVEN} |\w+ing )?captions?\b|\b{_GIVEN} captions?\b|(?<!closed )\bcaptions\b"
    r"|\bcaption (?:says|states|mentions|describes|indicates|suggests|tells|provided|given|above)\b"
    r"|\b(?:in|from|by|to|per|on) caption\b",
    re.IGNORECASE,
)
_DESCRIPTION = re.compile(
    rf"\b{_SOURCE} (?:{_GIVEN} )?(?:descriptions?|sentences)\b|\b{_GIVEN} (?:descriptions?|sentences?)\b"
    r"|\bdescriptions? (?:says?|states?|mentions?|indicates?|suggests?|provided|given|above)\b"
    r"|\b(?:is|are|was|were|being) described (?:as|in|above|by the (?:text|caption|description)s?)\b|\bas described\b"
    r"|\bhere(?:['’]s| is) (?:a|the|your|my) (?:\w+ )*description\b",
    re.IGNORECASE,
)
_COORDINATES = re.compile(
    r"\bbounding[- ]?box(?:es)?\b|\b(?:box|exact|provided|given|object|pixel|normali[sz]ed) coordinates\b"
    r"|\b(?:the|these|those|their|its) coordinates\b|\bcoordinates ?(?::|\(|\[|(?:of|for|provided|given|indicate)\b)"
    r"|[\[(] ?[01]?\.\d+ ?,|\b[xy]1\b",
    re.IGNORECASE,
)
_INFORMATION = re.compile(
    r"\b(?:provided|given|available|supplied|above) (?:information|context|data|details|text|input|list|annotations?)\b"
    r"|\b(?:information|context|data|details|text) (?:(?:that )?(?:is|are|was|were) )?(?:provided|given|supplied)\b"
    r"|\b(?:is|are|was|were)(?: not|n['’]t) (?:\w+ly )?(?:mentioned|specified|stated|described)\b"
    r"|\b(?:mentioned|listed|specified) in the (?:text|context|list|input|data|annotations?|information)\b"
    r"|\b(?:the|these) annotations?\b|\bbased on the (?:text|context|list|information|data)\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"[<>{}\[\]\\|^`_]|#{2,}|\*{2,}|([!?,;:=*-])\1{2,}|\.{4,}|(?:^|\s)(?:human|assistant|user)\s*:|https?://",
    re.IGNORECASE,
)
_STRAY = {"Cc", "Cf", "Cn", "Co", "Cs", "So", "Sk"}
_ALLOWED = set("\n°©®™")


def _unquoted(text: str) -> str:
    """A text without quotations, such as a sign in the image."""
    return _QUOTED.sub(" ", text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _running(words: list[str], size: int) -> int:
    """The largest number of times in a row that a phrase of `size` words occurs."""
    best = same = 0
    for i in range(size, len(words)):
        same = same + 1 if words[i] == words[i - size] else 0
        best = max(best, same)
    return best // size + 1


def _is_foreign(sentence: str) -> bool:
    letters = [sign for sign in sentence if sign.isalpha()]
    latin = sum(unicodedata.name(sign, "").startswith("LATIN") for sign in letters)
    if letters and latin < 0.7 * len(letters):
        return True
    words = _words(sentence)
    if len(words) < 4:
        return False
    english = sum(word in _ENGLISH for word in words)
    # Twice as many: a name such as "El Greco" is not a foreign sentence.
    return max(sum(word in other for word in words) for other in _FOREIGN) > max(1, 2 * english)


# The most frequent function words; for the other languages, without those that are also English words.
_FUNCTION_WORDS = {
    "English": "the a an and of to in is are on with at for from by it its this that there which who as be has have "
    "was were he she they their his her or not some one two another other while can into over",
    "Spanish": "el la los las un una y de del que en con por para se su es está están hay lo al como más sobre",
    "French": "le la les un une et de des du que en dans avec pour par est sont il elle sur au aux qui ce cette",
    "German": "der die das ein eine einen und ist sind mit auf im von zu den dem nicht es sich auch für eines einem",
    "Italian": "il lo la gli le un una e di del della che con per è sono nel nella su al da dei delle",
    "Portuguese": "o os as um uma e de do da dos das que em com para é são no na por se ao à mais",
    "Dutch": "de het een en van ik te dat die op met voor zijn er naar aan om bij ook uit",
}
_FOREIGN = [set(words.split()) for words in _FUNCTION_WORDS.values()]
_ENGLISH = _FOREIGN.pop(0)
