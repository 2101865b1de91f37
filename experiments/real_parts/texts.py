"""Plain-text questions: those whose answers are compared before and after training, and those of which the language
model's own answers are in the training data."""

import re

# Question → pattern of a right answer. The 20 of `text_kept` are the first 20 that the untrained model answers rightly.
QUESTIONS = {
    "What is the capital of France?": "paris",
    "What is the capital of Italy?": "rome",
    "What is the capital of Japan?": "tokyo",
    "What is the capital of England?": "london",
    "What is the capital of Germany?": "berlin",
    "What is the capital of Spain?": "madrid",
    "What is the capital of Russia?": "moscow",
    "What is the capital of China?": "beijing",
    "What is the capital of Egypt?": "cairo",
    "What is the capital of Greece?": "athens",
    "What is the largest planet in the solar system?": "jupiter",
    "Which planet is closest to the sun?": "mercury",
    "Which planet is known as the Red Planet?": "mars",
    "What is the largest ocean on Earth?": "pacific",
    "What is the chemical symbol of water?": "h2o|h₂o",
    "What is the chemical symbol of gold?": r"\bau\b",
    "What gas do plants take in for photosynthesis?": "carbon dioxide|co2",
    "Who wrote Romeo and Juliet?": "shakespeare",
    "Who painted the Mona Lisa?": "leonardo|da vinci",
    "Who developed the theory of relativity?": "einstein",
    "Who was the first president of the United States?": "washington",
    "Who discovered gravity?": "newton",
    "What is the opposite of hot?": "cold",
    "What is the opposite of big?": "small|little|tiny",
    "What language is spoken in Brazil?": "portuguese",
    "What language is spoken in Mexico?": "spanish",
    "How many days are in a week?": r"\b7\b|seven",
    "How many months are in a year?": r"\b12\b|twelve",
    "How many hours are in a day?": r"\b24\b|twenty.four",
    "How many legs does a spider have?": r"\b8\b|eight",
    "How many sides does a triangle have?": r"\b3\b|three",
    "What is 2 plus 2?": r"\b4\b|four",
    "What is 5 plus 3?": r"\b8\b|eight",
    "What color is the sky on a clear day?": "blue",
    "What color is grass?": "green",
    "What is frozen water called?": r"\bice\b",
    "What is the tallest mountain in the world?": "everest",
    "On which continent is Kenya?": "africa",
    "On which continent is India?": "asia",
    "What do bees make?": "honey",
    "What is a baby dog called?": "pup",
    "Which star is at the center of our solar system?": r"\bsun\b",
}

TOPICS = """rain, music, winter, a bicycle, the moon, a library, friendship, bread, football, a river, sleep, a volcano,
chess, a bridge, the internet, tea, a garden, a telescope, history, dreams, a train, a teacher, swimming, a cat,
the ocean, a violin, paper, a desert, snow, a clock, a market, gold, a forest, electricity, a poem, the heart,
an elephant, a computer, a castle, coffee, wind, a map, a camera, salt, a ship, democracy, a doctor, a mirror,
silk, a kite"""
FORMS = ("Tell me about {}.", "Write one sentence about {}.", "Why do people like {}?")


def prompts() -> list[str]:
    """Requests without a picture, none of which is among `QUESTIONS`."""
    return [form.format(topic) for topic in re.split(r",\s+", TOPICS) for form in FORMS]


def answers_right(question: str, answer: str) -> bool:
    """Whether an answer has what a right one has."""
    return re.search(QUESTIONS[question], answer.lower()) is not None


def chosen(answers: dict[str, str], count: int = 20) -> list[str]:
    """The first `count` questions that the untrained model answers rightly."""
    return [question for question in QUESTIONS if answers_right(question, answers.get(question, ""))][:count]
