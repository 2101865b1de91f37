"""Score recorded outputs of any model: ScienceQA, VQAv2, GQA, POPE, MME, captions, exact match."""

import json
from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    if argv[:1] == ["llava_bench"]:
        return hydra_verb("score_llava_bench", llava_bench, argv[1:])
    # The metric may stand as a word of its own.
    argv = [f"metric={word}" if n == 0 and word.isidentifier() else word for n, word in enumerate(argv)]
    return hydra_verb("score", score, argv)


def score(cfg: DictConfig) -> None:
    """Compare recorded outputs with the right answers, and print the metric's table; `out` takes it as files.

    mmlab score scienceqa predictions=answers.json references=problems.json splits=pid_splits.json split=test
    mmlab score vqa predictions=answers.jsonl references=v2_mscoco_val2014_annotations.json
    mmlab score pope predictions=answers.jsonl references=coco_pope_random.json
    mmlab score captions predictions=captions.json references=captions_val2014.json out=scores
    mmlab score llava_bench …     a language model marks answers (mmlab score llava_bench --help)

    Predictions are LLaVA's result file ({outputs: {id: text}, results: {id: index}}), {id: text}, or objects with an id
    and a text, as a list or as lines. References are the data set's own file, or lines of {key, answers, types,
    picture, choices}. A question without a prediction counts as wrong.
    """
    from mmlab.evaluate.scores.recorded import read_predictions, read_references
    from mmlab.evaluate.scores.scienceqa_score import differences
    from mmlab.evaluate.scores.score import table
    from mmlab.evaluate.scores.scorers import scorer_named
    from mmlab.runs.disk import no_file

    scorer = scorer_named(cfg.metric)
    out = None if cfg.out is None else no_file(Path(cfg.out))
    references = read_references(cfg.metric, cfg.references, cfg.splits, cfg.split)
    recorded = read_predictions(cfg.predictions)
    predictions = recorded.aligned(references)
    scores = scorer(predictions, references)
    missing = sum(text is None for text in predictions)
    found = {"metric": cfg.metric, **scores.as_json(), "missing": missing}
    print(table(scores.as_json(), scores.main))
    if missing:
        print(f"{missing:,} of {len(references):,} questions have no prediction")
    if unasked := len(recorded.texts) - (len(references) - missing):
        print(f"{unasked:,} predictions answer no question of these")
    if cfg.metric == "scienceqa" and recorded.indices:
        counts = found["recorded"] = differences(predictions, references, recorded.indices)
        differ, read = counts["differ"], counts["differ_with_letter"]
        print(f"recorded indices: {counts['compared']:,} compared, {differ:,} differ, {read:,} where there is a letter")
    if out is not None:
        write(out, cfg.metric, found, references, predictions, scores)


def write(out: Path, metric: str, found: dict, references: list, predictions: list, scores) -> None:
    """Write scores.json, a line for each question, and ScienceQA's results in LLaVA's layout."""
    from mmlab.evaluate.scores.scienceqa_score import result_layout
    from mmlab.evaluate.scores.score import write_scores

    write_scores(out, found)
    with (out / "scored.jsonl").open("w", encoding="utf-8") as lines:
        for reference, prediction, each in zip(references, predictions, scores.each, strict=True):
            row = {"key": reference.key, "prediction": prediction, "answers": reference.answers, "score": each}
            lines.write(json.dumps(row) + "\n")
    if metric == "scienceqa":
        layout = json.dumps(result_layout(predictions, references), indent=2)
        (out / "results.json").write_text(layout + "\n", encoding="utf-8")
    print(f"scores: {out / 'scores.json'}")


def llava_bench(cfg: DictConfig) -> None:
    """Let a language model mark recorded answers beside a baseline's; the same command asks for what is missing alone.

    mmlab score llava_bench predictions=answers.jsonl questions=qa90_questions.jsonl baseline=qa90_gpt4_answer.jsonl \\
      contexts=caps_boxes_coco2014_val_80.jsonl out=bench llm.model=gpt-4o-mini

    The key of the endpoint is read from OPENAI_API_KEY, or the variable that llm.variable names.
    """
    from mmlab.config.build import build
    from mmlab.curate.client import Client
    from mmlab.evaluate.scores.llava_bench import (
        bench_scores,
        judge_questions,
        marks_of,
        read_bench,
        read_rules,
        write_marks,
    )
    from mmlab.evaluate.scores.recorded import read_predictions
    from mmlab.evaluate.scores.score import table, write_scores
    from mmlab.runs.disk import no_file

    out = no_file(Path(cfg.out))
    questions = read_bench(cfg.questions, cfg.contexts, cfg.baseline)
    rules = {} if cfg.rules is None else read_rules(cfg.rules)
    asked = judge_questions(questions, read_predictions(cfg.predictions).texts, rules)
    judge = Client(build(cfg.llm), out / "replies")
    reviews, kept = ask_judge(asked, judge, cfg.llm.workers)
    marks = [marks_of(text) for text, _ in reviews]
    scores = bench_scores(questions, marks)
    unanswered = sum(bool(fault) for _, fault in reviews)
    about = {"metric": "llava_bench", "judge": judge.backend.model, "unanswered": unanswered}
    write_scores(out, {**about, **scores.as_json()})
    write_marks(out / "marks.jsonl", questions, reviews, marks)
    print(table(scores.as_json(), scores.main))
    if unanswered > kept:
        print(f"{unanswered - kept:,} questions got no reply; the same command asks for them again")
    if kept:
        print(f"{kept:,} replies were cut off, filtered or empty, and stay so; other llm.settings ask anew")
    print(f"marks and reviews: {out / 'marks.jsonl'}")


def ask_judge(asked: list, judge, workers: int) -> tuple[list[tuple[str, str]], int]:
    """What was said to each question, or why nothing was; and how many replies on the disk cannot be used, and stay."""
    from mmlab.curate.asking import answers
    from mmlab.curate.client import NoReply
    from mmlab.data.progress_bar import progress

    rows = [{"key": f"question {n}", "place": n} for n in range(len(asked))]
    reviews, kept = [("", "")] * len(asked), 0
    found = answers(rows, judge, lambda row: asked[row["place"]], workers)
    for row, reply in progress(found, "asking the judge", len(rows)):
        silent = isinstance(reply, NoReply)
        reviews[row["place"]] = ("", reply.reason) if silent else (reply.text, "")
        kept += silent and reply.kept
    return reviews, kept
