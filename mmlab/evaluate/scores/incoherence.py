"""Rules for incoherent descriptions: they repeat themselves, break off, or do not end.

After its first stage MiniGPT-4 repeats words and sentences and leaves some unfinished, which its second stage corrects
(MiniGPT-4, section 3). The third rule is for descriptions that had to be cut off.
"""

import re
from collections.abc import Sequence
from typing import Any

NGRAM = 8  # words; shorter ones ("in front of the house") occur twice in good descriptions too
PHRASE = 4  # words; a shorter phrase may be repeated once by chance
# Words that do not end a phrase.
OPEN_WORDS = """a an the and or but nor of in on at by with without from to into onto over under between behind beside
near is are was were be has have its their his her this these that which who whose as than very"""
OPEN = frozenset(OPEN_WORDS.split())
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_ENDS = re.compile(r"[.!?…。！？\n]+")
_FINAL = re.compile(r"""[.!?…。！？]["'”’)\]]*$""")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def repeats(text: str) -> bool:
    """Whether a sentence or `NGRAM` words occur twice, a phrase twice in succession, or a short one three times."""
    words = words_of(text)
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    sentences = [tuple(words_of(sentence)) for sentence in _ENDS.split(text)]
    sentences = [sentence for sentence in sentences if len(sentence) > 2]
    if len(set(ngrams)) < len(ngrams) or len(set(sentences)) < len(sentences):
        return True
    for size in range(1, NGRAM):
        times = 2 if size >= PHRASE else 3
        for start in range(len(words) - size * times + 1):
            if words[start : start + size] * times == words[start : start + size * times]:
                return True
    return False


def finished(text: str) -> bool:
    """Whether a text ends with a full stop or another mark that ends a sentence."""
    return _FINAL.search(text.strip()) is not None


def breaks_off(text: str, sentences: bool) -> bool:
    """Whether a text is empty or ends in the middle of a phrase.

    Args:
        text: the description.
        sentences: whether complete descriptions end with a full stop, as captions often do not.
    """
    words = words_of(text)
    if not words or (sentences and not finished(text)):
        return True
    return not finished(text) and (words[-1] in OPEN or text.strip()[-1] in ",;:-(&")


def faults_of(text: str, ended: bool, sentences: bool) -> list[str]:
    """The faults of a description, of `repeated`, `fragment` and `no_end`; empty if it is coherent.

    Args:
        text: the description.
        ended: whether it was finished rather than cut off.
        sentences: see `breaks_off`.
    """
    faults = {"repeated": repeats(text), "fragment": breaks_off(text, sentences), "no_end": not ended}
    return [name for name, present in faults.items() if present]


def incoherence(faults: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Shares of descriptions with each fault, and with any: `{descriptions, incoherent, repeated, fragment, no_end}`.

    Args:
        faults: the faults of each description; at least one description.
    """
    shares = {name: sum(name in one for one in faults) / len(faults) for name in ("repeated", "fragment", "no_end")}
    return {"descriptions": len(faults), "incoherent": sum(map(bool, faults)) / len(faults), **shares}
