"""Contest: LLaVA's stage 2 with ten questions about each picture, from the start to the saved model.

Connector and language model are trained. transformers has a row for each question, with the picture in it; mmlab has a
picture once, and its questions behind it. See `llava_runs` for models and data, and docs/speed.md for what is compared.

    python benchmarks/llava_questions.py [ROUNDS]
"""

import random
from functools import partial
from pathlib import Path

import llava_runs
from contest import Contest, main, tiny

QUESTIONS = 10
TRAINING = llava_runs.Training(
    "finetune", samples=2, steps=3 if tiny() else 5, warm=1, template="v1", trains_language=True
)


def prepare(folder: Path) -> None:
    rng = random.Random(0)
    records = [
        {
            "questions": [
                {
                    "question": f"{llava_runs.words(rng, rng.randint(4, 10))}?",
                    "answer": llava_runs.words(rng, rng.randint(1, 4)),
                }
                for _ in range(QUESTIONS)
            ]
        }
        for _ in range(TRAINING.samples * TRAINING.steps)
    ]
    llava_runs.prepare(folder, TRAINING, records)


CONTEST = Contest(
    "LLaVA, stage 2, ten questions a picture",
    "pictures",
    {
        "transformers' Trainer": partial(llava_runs.train_theirs, training=TRAINING),
        "mmlab train": partial(llava_runs.train_ours, training=TRAINING),
    },
    prepare,
    goals={"mmlab train": 5},
)

if __name__ == "__main__":
    main(CONTEST)
