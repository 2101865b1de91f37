"""What each rule catches, and similar texts that pass."""

import pytest

from mmlab.config.errors import ConfigError
from mmlab.curate.rules import RULES, caught_by, check_rules, sentences_of

CAUGHT = {
    "empty": ["", "   \n", "...", "!?", "— “ ”", "***"],
    "repeats": [
        "The dog is very very very happy.",
        "A cat and a cat and a cat and a cat.",
        "There is a red star. There is a red star.",
        "There is a red star! It is small. there is a RED star.",
        "a red circle on the left a red circle on the left",
        "The man is standing in the room, the man is standing in the room.",
        "It is 5 5 5.",
        " ".join(f"The man in the red coat is near the {thing}." for thing in ("car", "tree", "dog", "house", "lake")),
    ],
    "unfinished": [
        "a red circle",
        "The dog is on the",
        "The dog is on the.",
        "The picture shows a dog and.",
        "The dog looks at...",
        "The dog looks at…",
        "The dog looks happy,",
        "A sign that says “stop.",
        'A sign that says "stop.',
        "A dog (with a hat.",
        "It was painted by Dr.",
        "Things on a table, e.g.",
    ],
    "apology": [
        "I'm sorry I made a mistake when describing the picture.",
        "I’m so sorry, the dog is red.",
        "I apologize for that. The dog is red.",
        "I sincerely apologise.",
        "My apologies. It is a dog.",
        "Sorry, it is a dog.",
        "It is a dog. As an AI language model, it is hard to say.",
        "I cannot see the picture.",
        "I don’t actually see a dog.",
        "I’m unable to view it.",
    ],
    "explanation": [
        "Sure! A dog runs.",
        "Here is the corrected paragraph: A dog runs.",
        "Here's your text. A dog runs.",
        "**Corrected version** A dog runs.",
        "The paragraph is already correct.",
        "A dog runs. No changes were necessary.",
    ],
    "symbols": [
        "A dog � runs.",
        "A dog runs.\x07",
        "A dog\u200b runs.",
        "A dog runs. ###",
        "A dog runs. Human: Continue",
        "<Img>A dog runs.",
        "A dog runs!!!!",
        "A dog runs. 😀",
        "A dog **runs**.",
        "A dog \ue000 runs.",
        "See https://example.org for a dog.",
        "A dog | a cat.",
        "A dog ..... runs.",
        "\ufeffA dog runs.",
    ],
    "language": [
        "Ein Hund läuft mit einem Ball durch den Park.",
        "A dog runs. Una mujer con un perro en el parque.",
        "Un chien est assis sur la table dans la maison.",
        "Собака бежит.",
        "一只红色的狗。",
        "A dog runs. 犬が走っている。",
        "Een hond en een kat zitten op het bed.",
        "Um homem com uma bola na praia.",
        "pies biega po parku a obok siedzi kot na drzewie " * 3,
    ],
}
CAUGHT |= {
    "caption": [
        "The caption says that it rains.",
        "As the captions mention, a man waits.",
        "According to the first caption, it rains.",
        "What does this caption tell about the dog?",
        "It follows from the provided caption.",
        "One of the captions names a dog.",
        "Captions suggest that it is late.",
    ],
    "description": [
        "Based on the description, it is late.",
        "In the picture, they are described as antique.",
        "The given descriptions say that it rains.",
        "The sentences tell of a dog.",
        "The image description mentions a dog.",
        "The second sentence names a dog.",
        "As described, the dog waits.",
        "Here is a detailed description of the scene.",
    ],
    "coordinates": [
        "The bounding box of the dog is small.",
        "The dog is at [0.12, 0.5, 0.3, 0.9].",
        "The dog is at (0.12, 0.5).",
        "Judging by the coordinates, it is on the left.",
        "Its box coordinates are large.",
        "The coordinates of the dog are small.",
        "The dog has x1 at the left edge.",
    ],
    "information": [
        "From the provided information, it is late.",
        "The information given is not enough.",
        "The colour is not mentioned.",
        "It isn't explicitly stated who he is.",
        "Based on the context, it is late.",
        "A dog is listed in the annotations.",
        "The given context tells of a dog.",
    ],
}
FINE = [
    "The image shows two dogs side by side by side on a lawn. They look happier and happier.",
    "There is a red circle on the left. There is a red square on the right.",
    'A man in a red hat, a man in a blue hat, and a woman stand near a 5" screen.',
    "The sign reads “I'm sorry” and “出口”, and the boy says he is sorry.",
    'A shop window with the words "Sure! Wir sind am Montag für Sie da" on it.',
    "It is 30 °C, costs 5 €, and the time is 5 p.m.",
    "The child draws the letter A.",
    "The painting Los de la Calle by El Greco hangs on the wall of a café.",
    "Is it a dog? Yes (a small one).",
    "She whispers, “Come in.”",
    "This is an original version of the painting, and a paragraph is printed below it.",
    "Number #1 & 2/3 of the runners: well-known, naïve, and 100% ready – almost.\n\nThe last one’s tired.",
    "Apples, oranges, pears, grapes, plums.",
    "Here is a picture of a dog that had had enough.",
    "A poster with a caption and a short description of a lost dog hangs on the wall.",
    "Could you describe the box, and who coordinates the work?",
    "The television shows closed captions.",
    "The scene can be described as peaceful, and shade is provided by the trees.",
    "The sentence “the caption says so” is written on the wall.",
    "At 0.5 miles, 3.5, and a ratio of 1.2 to 1, the box (a large one) is full of doughnuts.",
    "It provides information to travellers, and the context of the scene is a market.",
]


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in CAUGHT.items() for text in texts])
def test_caught(rule, text):
    assert RULES[rule](text)


@pytest.mark.parametrize("text", FINE)
def test_fine(text):
    assert caught_by(text, list(RULES)) == []


def test_every_rule_that_catches_is_named():
    text = "I'm sorry, sorry, sorry, sorry the dog ### is"
    assert caught_by(text, list(RULES)) == ["repeats", "unfinished", "apology", "symbols"]
    assert caught_by(text, ["symbols", "language"]) == ["symbols"]
    assert caught_by(" ", list(RULES)) == ["empty"]
    assert caught_by("", ["unfinished", "repeats"]) == ["unfinished"]


def test_an_unknown_rule_is_one_sentence():
    with pytest.raises(ConfigError, match=r"There is no rule 'repeat'\. Did you mean 'repeats'\?"):
        check_rules(["language", "repeat"])
    check_rules(list(RULES))


def test_sentences():
    assert sentences_of("A dog. “A cat!” Is it?\n\nYes: v1.5 is.") == ["A dog.", "“A cat!”", "Is it?", "Yes: v1.5 is."]
