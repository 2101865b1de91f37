"""Lists of lettered options with questions about their letters, as text alone: for small language models to learn."""

import random
from collections.abc import Iterator, Sequence

from mmlab.config.errors import ConfigError
from mmlab.data.shards import Samples
from mmlab.data.sources.scenes import COLOURS, KINDS
from mmlab.data.sources.scienceqa_problems import LETTERS

WORDS = (*COLOURS, *KINDS)


def letters(count: int, split: str = "train", seed: int = 0) -> Samples:
    """Write `count` dialogues, each about one list of two to five words under ScienceQA's letters.

    Each turn names a word that the list has and asks for its letter; the words are colours and shapes, no word is asked
    for twice. Dialogue i depends on (seed, split, i) alone.

    Args:
        count: how many samples.
        split: a word that makes another stream, such as `train` or `val`.
        seed: another number makes other lists.

    Returns:
        Counts: `samples`, `questions`.

    Raises:
        ConfigError: no sample is asked for.
    """
    if count < 1:
        raise ConfigError(f"letters need a count of at least 1, not {count}.")
    counts = {"samples": 0, "questions": 0}
    for i in range(count):
        name = f"{split}-letters-{i:07d}"
        turns = list(_turns(random.Random(f"{seed}/{split}/letters/{i}")))
        counts["samples"] += 1
        counts["questions"] += len(turns)
        dialogue = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        yield name, {"json": {"id": name, "type": "letters", "conversations": dialogue}}
    return counts


def options(choices: Sequence[str]) -> str:
    """Choices as a problem lists them: "(A) red (B) star"."""
    return " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _turns(rng: random.Random) -> Iterator[tuple[str, str]]:
    """Question and answer for each word of a list, in any order; the first question brings the list along."""
    choices = rng.sample(WORDS, rng.randint(2, len(LETTERS)))
    listed = f"\nContext: N/A\nOptions: {options(choices)}"
    for number, choice in enumerate(rng.sample(choices, len(choices))):
        question = f"Which is {choice}?"
        yield question + ("" if number else listed), f"The answer is {LETTERS[choices.index(choice)]}."
