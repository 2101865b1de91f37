"""Whether a description babbles: it repeats itself, breaks off, or does not end.

After its first stage MiniGPT-4 repeats words and sentences and leaves some unfinished; its second stage is the cure
(MiniGPT-4, section 3). These are the two as rules, and a third: a description that has to be cut off.
"""

import re
from collections.abc import Sequence
from typing import Any

NGRAM = 8  # words; shorter ones ("in front of the house") occur twice in good descriptions too
PHRASE = 4  # words from which on a phrase that follows on itself is none by chance; shorter ones may, once
# Words that no phrase ends with.
OPEN_WORDS = """a an the and or but nor of in on at by with without from to into onto over under between behind beside
near is are was were be has have its their his her this these that which who whose as than very"""
OPEN = frozenset(OPEN_WORDS.split())
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ENDS = re.compile(r"[.!?…。！？\n]+")
_FINAL = re.compile(r"""[.!?…。！？]["'”’)\]]*$""")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without marks."""
    return _WORD.findall(text.lower())


def repeats(text: str) -> bool:
    """Whether a sentence or `NGRAM` words in a row occur twice, a phrase twice on end, or a short one three times."""
    words = words_of(text)
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    said = [tuple(words_of(sentence)) for sentence in _ENDS.split(text)]
    sentences = [sentence for sentence in said if len(sentence) > 2]
    if len(set(ngrams)) < len(ngrams) or len(set(sentences)) < len(sentences):
        return True
    for size in range(1, NGRAM):
        times = 2 if size >= PHRASE else 3
        for start in range(len(words) - size * times + 1):
            if words[start : start + size] * times == words[start : start + size * times]:
                return True
    return False


def finished(text: str) -> bool:
    """Whether a text ends with a full stop, or another mark that ends a sentence."""
    return _FINAL.search(text.strip()) is not None


def breaks_off(text: str, sentences: bool) -> bool:
    """Whether nothing is said, or the text ends in the middle of a phrase.

    Args:
        text: the description.
        sentences: whether a whole description ends with a full stop; captions often do not.
    """
    words = words_of(text)
    if not words or (sentences and not finished(text)):
        return True
    return not finished(text) and (words[-1] in OPEN or text.strip()[-1] in ",;:-(&")


def faults(text: str, ended: bool, sentences: bool) -> list[str]:
    """What is wrong with a description: `repeated`, `fragment`, `no_end`; none where it is coherent.

    Args:
        text: the description.
        ended: whether the model ended it by itself.
        sentences: see `breaks_off`.
    """
    found = {"repeated": repeats(text), "fragment": breaks_off(text, sentences), "no_end": not ended}
    return [name for name, there in found.items() if there]


def incoherence(found: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Shares of descriptions with each fault, and with any: `{descriptions, incoherent, repeated, fragment, no_end}`.

    Args:
        found: the faults of each description; at least one description.
    """
    shares = {name: sum(name in one for one in found) / len(found) for name in ("repeated", "fragment", "no_end")}
    return {"descriptions": len(found), "incoherent": sum(map(bool, found)) / len(found), **shares}
