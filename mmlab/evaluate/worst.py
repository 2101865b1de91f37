"""The worst answers, on a page with their pictures."""

from collections.abc import Sequence

from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.questions import Question, read_picture
from mmlab.evaluate.scores import Scores, show
from mmlab.report.cases import Case, cases_page

SIDE = 320


def worst(each: Sequence[float], count: int) -> list[int]:
    """The places of the lowest scores below 1, in order of score; of equals the ones that are cut are spread evenly."""
    found: list[int] = []
    for score in sorted({score for score in each if score < 1}):
        equal = [n for n, other in enumerate(each) if other == score]
        room = count - len(found)
        if room <= 0:
            break
        step = max(1.0, len(equal) / room)
        found += [equal[int(i * step)] for i in range(min(room, len(equal)))]
    return found


def worst_page(
    index: ShardIndex, questions: Sequence[Question], predictions: Sequence[str], scores: Scores, count: int = 48
) -> str:
    """The worst `count` answers as HTML: picture, question, what was said, what is right.

    Raises:
        DataError: a picture that cannot be read.
    """
    spec = ImageSpec(SIDE)
    chosen = worst(scores.each, count)
    cases = [
        Case(
            read_picture(index, questions[n].sample, spec),
            f"{questions[n].key} · {', '.join(questions[n].reference.types)} · {scores.each[n]:.2f}",
            {
                **({"question": questions[n].text} if questions[n].text else {}),
                "said": predictions[n] or "(nothing)",
                "right": " · ".join(dict.fromkeys(questions[n].reference.answers)),
            },
        )
        for n in chosen
    ]
    missed = sum(score < 1 for score in scores.each)
    whole = f"{scores.main.replace('_', ' ')} {show(scores.main, scores.all[scores.main])}"
    return cases_page(f"{whole} of {len(questions):,} questions; {len(chosen)} of {missed:,} that lose a mark", cases)
