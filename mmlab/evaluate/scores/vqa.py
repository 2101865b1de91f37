"""VQAv2's soft accuracy: an answer counts by the number of people who gave it, after the official normalization."""

import re
from collections import Counter
from collections.abc import Sequence

from mmlab.evaluate.scores.score_table import Reference, Row, Scores, rows_of, share

AGREE = 3  # people who have to give an answer to make it entirely right
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,\d")
# The official pattern lacks its intended lookbehind: a full stop after a digit is removed, too, unless one follows.
_STOP = re.compile(r"\.(?!\d)")
_ARTICLES = ("a", "an", "the")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_DIGITS)}}
# Contractions with missing apostrophes, and their correct spelling.
_WRITTEN = """aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've
    hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's
    isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
    shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd
    someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
    somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
    they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
    we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
    whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
    y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
    youve:you've"""
_CONTRACTIONS = {bare: meant for bare, _, meant in (pair.partition(":") for pair in _WRITTEN.split())}


def normalized(answer: str) -> str:
    """The form in which answers are compared: without punctuation and articles, digits for numbers, with apostrophes.

    Punctuation is removed if it is next to a space or if the answer has a comma between digits; otherwise it is
    replaced by a space.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    joined = _COMMA.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        gone = joined or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if gone else " ")
    words = [_NUMBERS.get(word, word) for word in _STOP.sub("", out).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The mean of min(1, people with the same answer / 3) over all subsets that leave one person out.

    Both sides are normalized, as the data set's page says; versions of the released code do not normalize an answer on
    which all agree, so that punctuation in it could not be matched. With a single answer it is exact match.
    """
    same = Counter(normalized(answer) for answer in answers)[normalized(prediction)]
    if len(answers) == 1:
        return float(same)
    # Of n people, `same` leave same - 1 that agree if they are left out, the others `same`.
    without, within = min(1.0, same / AGREE), min(1.0, (same - 1) / AGREE) if same else 0.0
    return (same * within + (len(answers) - same) * without) / len(answers)


def vqa(predictions: Sequence[str | None], references: Sequence[Reference]) -> Scores:
    """Soft accuracy, overall and per type (of question, of answer); a missing prediction counts 0."""
    pairs = zip(predictions, references, strict=True)
    each = [0.0 if p is None else soft_accuracy(p, r.answers) for p, r in pairs]

    def row(places: list[int]) -> Row:
        return {"accuracy": share(sum(each[n] for n in places), len(places)), "questions": len(places)}

    return Scores(*rows_of(references, row), each)
