"""Ask a run which picture has more circles, with pictures hidden: hide.py RUN SHARDS.

A hidden picture is blank and takes the same places in the prompt. Prints one JSON object: for each choice of hidden
pictures the accuracy, and the share of the reply that is most common.
"""

import json
import sys
from collections import Counter

from mmlab.data.index import ShardIndex
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.baselines import blank
from mmlab.evaluate.questions import read_questions
from mmlab.runs.run import find_run
from mmlab.stage.assembly import restore, run_prompt

HIDDEN = {"both_shown": (), "first_hidden": (0,), "second_hidden": (1,), "both_hidden": (0, 1)}


class Hiding(Answerer):
    """Asks with the pictures `hidden` blank."""

    hidden: tuple[int, ...] = ()

    def complete(self, prompts, pictures):
        shown = [[blank(one) if n in self.hidden else one for n, one in enumerate(both)] for both in pictures]
        return super().complete(prompts, shown)


def main(run: str, shards: str) -> None:
    model, trained = restore(find_run(run, "runs"))
    answerer = Hiding(model.eval(), run_prompt(trained, None), trained.data, 8)
    index = ShardIndex.open(shards)
    questions = read_questions(index, ["more"])
    figures = {}
    for name, hidden in HIDDEN.items():
        answerer.hidden = hidden
        answers = dict(answer_questions(answerer, index, questions, 120))
        right = sum(answers[n] == question.answer for n, question in enumerate(questions))
        (_, most), *_ = Counter(answers.values()).most_common(1)
        figures[name] = {"accuracy": right / len(questions), "commonest_share": most / len(questions)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
