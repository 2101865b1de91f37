"""Caption scores, equal to those of COCO's own code (pycocoevalcap 1.2) for the same tokens."""

import pytest

from mmlab.evaluate.scores.caption_scores import bleu, captions, cider_d, rouge_l, tokens_of
from mmlab.evaluate.scores.score_table import Reference

SAID = [
    "a man rides a brown horse on the beach",
    "two dogs play in the snow",
    "a plate of food on a table with a fork and a knife",
    "a red bus",
    "the the the the",
    "a cat sleeps on the couch next to a cat",
]
WRITTEN = [
    ["a man riding a horse on a beach", "a person rides a brown horse along the beach", "man on horse near the ocean"],
    ["two dogs are playing in the snow", "a couple of dogs run through snow"],
    [
        "a plate of food with a fork and knife",
        "a table with a plate of food on it",
        "dinner is served on a white plate",
    ],
    ["a red double decker bus drives down the street", "a red bus on a city street"],
    ["the sky above the sea", "clouds over the water"],
    ["a cat is sleeping on a couch", "a gray cat sleeps on the couch", "cat on couch"],
]
# Bleu(4), Rouge() and Cider() of pycocoevalcap 1.2 on these.
BLEU = [0.8222222222039507, 0.7403702777137343, 0.6149465211797833, 0.4955204480592075]
ROUGE = [0.7777777777777778, 0.7587064676616916, 0.8459167950693374, 0.5596330275229358, 0.43571428571428567]
ROUGE += [0.7854077253218884]
CIDER = [2.526877075782856, 2.3263640592779664, 3.209800821804063, 2.3778170130057648, 0.0902554272663681]
CIDER += [1.9834268448279704]

references = [Reference(str(n), tuple(texts)) for n, texts in enumerate(WRITTEN)]
split = [text.split() for text in SAID], [[text.split() for text in texts] for texts in WRITTEN]


def test_bleu():
    assert bleu(*split) == pytest.approx(BLEU, rel=1e-12)


def test_rouge_l():
    assert [rouge_l(*pair) for pair in zip(*split, strict=True)] == pytest.approx(ROUGE, rel=1e-12)


def test_cider_d():
    assert cider_d(*split) == pytest.approx(CIDER, rel=1e-12)


def test_the_table():
    scores = captions(SAID, references)
    assert [scores.all[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(BLEU)
    assert scores.all["rouge_l"] == pytest.approx(sum(ROUGE) / 6)
    assert scores.all["cider_d"] == pytest.approx(2.0857568736608316) == pytest.approx(sum(scores.each) / 6)
    assert (scores.all["questions"], scores.all["words"], scores.main) == (6, 7.5, "cider_d")


def test_the_caption_itself_scores_best_and_an_empty_one_zero():
    best = captions([texts[0] for texts in WRITTEN], references).all
    assert best["bleu_4"] == pytest.approx(1) and best["rouge_l"] == pytest.approx(1)
    none = captions([None, *[""] * 5], references).all
    assert none["bleu_1"] == pytest.approx(0) and none["rouge_l"] == none["cider_d"] == none["words"] == 0


def test_punctuation_and_case_do_not_matter():
    loud = [text.upper().replace(" ", ",  ", 1) + "." for text in SAID]
    assert captions(loud, references).all == captions(SAID, references).all


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man, in black-and-white.", "a man in black-and-white"),
        ("It's the dog's ball.", "it 's the dog 's ball"),
        ("They don't, can't or won’t.", "they do n't ca n't or wo n't"),
        ("I cannot see", "i can not see"),
        ("3.5 of 1,000 at 10:30", "3.5 of 1,000 at 10:30"),
        ("five o'clock (sharp)", "five o'clock sharp"),
        ("the dogs' toys", "the dogs toys"),
        ("$5 & 50%", "$ 5 & 50 %"),
        ('"quoted" -- words...', "quoted words"),
        ("naïve café", "naïve café"),
        ("", ""),
    ],
)
def test_tokens(caption, tokens):
    assert tokens_of(caption) == tokens.split()
