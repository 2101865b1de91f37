"""Contest: LLaVA's stage 1 on captions, from the start of the process to the saved connector.

The vision encoder and the language model are frozen. Captions are as long as CC3M's: 10.3 words with a deviation of
4.5 (Sharma et al. 2018, table 1). See `llava_runs` for models and data, and docs/speed.md for what is compared.

    python benchmarks/llava_stage1.py [ROUNDS]
"""

import random
from functools import partial
from pathlib import Path

import llava_runs
from contest import Contest, main, tiny

TRAINING = llava_runs.Training(
    "align", samples=8, steps=4 if tiny() else 10, warm=2, template="plain", trains_language=False
)


def prepare(folder: Path) -> None:
    rng = random.Random(0)
    records = [
        {"caption": llava_runs.words(rng, max(3, round(rng.lognormvariate(2.245, 0.418))))}
        for _ in range(TRAINING.samples * TRAINING.steps)
    ]
    llava_runs.prepare(folder, TRAINING, records)


CONTEST = Contest(
    "LLaVA, stage 1",
    "samples",
    {
        "transformers' Trainer": partial(llava_runs.train_theirs, training=TRAINING),
        "mmlab train": partial(llava_runs.train_ours, training=TRAINING),
    },
    prepare,
    goals={"mmlab train": 2},
)

if __name__ == "__main__":
    main(CONTEST)
