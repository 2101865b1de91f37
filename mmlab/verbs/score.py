"""Score recorded outputs of any model: ScienceQA, VQAv2, GQA, POPE, MME, captions, exact match, FID."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb


def main(argv: list[str]) -> int:
    if argv[:1] == ["llava_bench"]:
        return hydra_verb("score_llava_bench", llava_bench, argv[1:])
    if argv[:1] == ["fid"]:
        return hydra_verb("score_fid", fid, argv[1:])
    if argv and argv[0].isidentifier():  # the metric's name alone
        argv = [f"metric={argv[0]}", *argv[1:]]
    return hydra_verb("score", score, argv)


def score(cfg: DictConfig) -> None:
    """Compare recorded outputs with the right answers, and print the metric's table; `out` also writes files.

    mmlab score scienceqa predictions=answers.json references=problems.json splits=pid_splits.json split=test
    mmlab score vqa predictions=answers.jsonl references=v2_mscoco_val2014_annotations.json
    mmlab score pope predictions=answers.jsonl references=coco_pope_random.json
    mmlab score captions predictions=captions.json references=captions_val2014.json out=scores
    mmlab score fid pictures=samples references=data/classes/val features=classes/features
    mmlab score llava_bench …     a language model marks answers (mmlab score llava_bench --help)

    Predictions are LLaVA's result file ({outputs: {id: text}, results: {id: index}}), {id: text}, or objects with an id
    and a text, as a list or as lines. References are the data set's own file, or lines of {key, answers, types,
    picture, choices}. A question without a usable prediction counts as wrong; a question
    without a usable right answer is left out.
    """
    from mmlab.data.bad_samples import BadSamples
    from mmlab.evaluate.scores.constant_reply import variety_line, with_baselines
    from mmlab.evaluate.scores.recorded_outputs import read_predictions, read_references
    from mmlab.evaluate.scores.scienceqa_score import differences
    from mmlab.evaluate.scores.score_table import table
    from mmlab.evaluate.scores.scorers import scorable, scorer_named
    from mmlab.runs.disk import no_file

    scorer = scorer_named(cfg.metric)
    out = None if cfg.out is None else no_file(Path(cfg.out))
    bad = BadSamples(cfg.references, 0, cfg.bad_budget, "question")
    bad_predictions = BadSamples(cfg.predictions, 0, cfg.bad_budget, "prediction")
    references = read_references(cfg.metric, cfg.references, cfg.splits, cfg.split, bad)
    references = [references[n] for n in scorable(scorer, references, bad)]
    recorded = read_predictions(cfg.predictions, bad_predictions)
    predictions = recorded.aligned(references)
    scores = scorer(predictions, references)
    missing = sum(text is None for text in predictions)
    summary = {"metric": cfg.metric, **scores.as_json(), **with_baselines(scorer, predictions, references)}
    print(table(summary, scores.main))
    print(variety_line(summary["replies"], len(references)))
    summary["missing"] = missing
    summary |= {"bad_questions": bad.as_json(), "bad_predictions": bad_predictions.as_json()}
    if missing:
        print(f"{missing:,} of {len(references):,} questions have no prediction")
    for one in filter(len, (bad, bad_predictions)):
        print(f"{one.root}: {one}")
    if unused := len(recorded.texts) - (len(references) - missing):
        print(f"{unused:,} predictions belong to none of the questions")
    if cfg.metric == "scienceqa" and recorded.indices:
        counts = summary["recorded"] = differences(predictions, references, recorded.indices)
        differ, lettered = counts["differ"], counts["differ_with_letter"]
        print(f"recorded indices: {counts['compared']:,} compared, {differ:,} differ, {lettered:,} with a letter")
    if out is not None:
        write(out, summary, references, predictions, scores)


def write(out: Path, summary: dict, references: list, predictions: list, scores) -> None:
    """Write scores.json, scored.jsonl with a line per question, and for ScienceQA results.json in LLaVA's layout."""
    from mmlab.evaluate.scores.scienceqa_score import result_layout
    from mmlab.evaluate.scores.score_table import write_scores
    from mmlab.runs.disk import write_json, write_lines

    write_scores(out, summary)
    write_lines(
        out / "scored.jsonl",
        (
            {"key": reference.key, "prediction": prediction, "answers": reference.answers, "score": each}
            for reference, prediction, each in zip(references, predictions, scores.each, strict=True)
        ),
    )
    if summary["metric"] == "scienceqa":
        write_json(out / "results.json", result_layout(predictions, references), indent=2)
    print(f"scores: {out / 'scores.json'}")


def fid(cfg: DictConfig) -> None:
    """Compare a folder of images, such as a model's samples, with real ones: FID and KID; `out` also writes files.

    mmlab score fid pictures=samples references=data/classes/val features=classes/features
    mmlab score fid pictures=samples references=photos features=facebook/dinov2-base size=256 out=scores

    Both are folders of image files or of shards. The network is a run of stage=contrastive, also one that was trained
    on classes alone (experiment=classes/features), inception, or another model's folder or name on the hub.
    """
    from mmlab.verbs._fid import score_folders

    score_folders(cfg)


def llava_bench(cfg: DictConfig) -> None:
    """Let a language model mark recorded answers against a baseline's; the same command retries missing marks.

    mmlab score llava_bench predictions=answers.jsonl questions=qa90_questions.jsonl baseline=qa90_gpt4_answer.jsonl \\
      contexts=caps_boxes_coco2014_val_80.jsonl out=bench llm.model=gpt-4o-mini

    The endpoint's key is read from OPENAI_API_KEY, or from the variable that llm.variable names.
    """
    from mmlab.config.build import build
    from mmlab.curate.client import Client, NoReply
    from mmlab.data.progress_bar import progress
    from mmlab.evaluate.scores import llava_bench as bench
    from mmlab.evaluate.scores.constant_reply import variety, variety_line
    from mmlab.evaluate.scores.recorded_outputs import read_predictions
    from mmlab.evaluate.scores.score_table import table, write_scores
    from mmlab.runs.disk import no_file

    config: Any = OmegaConf.to_object(cfg)
    out = no_file(Path(config.out))
    questions = bench.read_bench(config.questions, config.contexts, config.baseline)
    rules = {} if config.rules is None else bench.read_rules(config.rules)
    answers = read_predictions(config.predictions).texts
    messages = bench.judge_questions(questions, answers, rules)
    judge = Client(config.llm, build(config.llm), out / "replies")
    rows = [{"key": f"question {n}", "place": n} for n in range(len(messages))]
    replies: list[Any] = [None] * len(rows)
    arriving = judge.replies(rows, lambda row: messages[row["place"]])
    for row, reply in progress(arriving, "asking the judge", len(rows)):
        replies[row["place"]] = reply
    failed = [reply for reply in replies if isinstance(reply, NoReply)]
    reviews = [("", reply.reason) if isinstance(reply, NoReply) else (reply.text, "") for reply in replies]
    marks = [bench.marks_of(text) for text, _ in reviews]
    scores = bench.bench_scores(questions, marks)
    varied = variety([answers[question.key] for question in questions])
    summary = {"metric": "llava_bench", "replies": varied, "judge": judge.backend.model, "unanswered": len(failed)}
    write_scores(out, {**summary, **scores.as_json()})
    bench.write_marks(out / "marks.jsonl", questions, reviews, marks)
    print(table(scores.as_json(), scores.main))
    print(variety_line(varied, len(questions)))
    stored = sum(reply.stored for reply in failed)
    if len(failed) > stored:
        print(f"{len(failed) - stored:,} questions got no reply; the same command retries them")
    if stored:
        print(f"{stored:,} replies were cut off, filtered or empty, and stay so unless llm.settings change")
    print(f"marks and reviews: {out / 'marks.jsonl'}")
