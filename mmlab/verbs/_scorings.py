"""The scorings of `mmlab eval`: of answers, descriptions and texts; those of images are in `_picture_scorings`."""

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate import descriptions as described
from mmlab.evaluate.answer_report import answer_scores, draw_grid, notes_of, predict, worst_page, write_predictions
from mmlab.evaluate.answers import Answerer, AnswerFile
from mmlab.evaluate.baselines import BlindAnswerer, answer_blind
from mmlab.evaluate.config import AnswerQualityConfig
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question, read_questions
from mmlab.evaluate.scores.caption_scores import captions
from mmlab.evaluate.scores.constant_reply import with_baselines
from mmlab.evaluate.scores.scienceqa_score import result_layout
from mmlab.evaluate.scores.score_table import UNTYPED, table, write_scores
from mmlab.evaluate.scores.scorers import scorable, scorer_named
from mmlab.runs.disk import replacing, write_json, write_text
from mmlab.stage.assembly import description_prompt, restore, told_prompt, trained_prompt
from mmlab.stage.perplexity import perplexities
from mmlab.training.artifacts import content_hashes
from mmlab.training.trainer import place
from mmlab.verbs._matching import score_matching
from mmlab.verbs._picture_scorings import print_bad, report, score_first_stage, score_generator

ANSWER_TOKENS = AnswerQualityConfig.max_new_tokens
REASONING_TOKENS = 1024  # the answer comes last; as in LLaVA's published evaluation of ScienceQA
DESCRIPTION_TOKENS = 300  # as in MiniGPT-4's published demo


def score_answers(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Ask a vision-language model questions whose answers are known; the same command resumes a killed evaluation."""
    metric = cfg.metric or "exact"
    scorer, index = scorer_named(metric), ShardIndex.open(cfg.data.path)
    bad = BadSamples(index.root, len(index), cfg.data.bad_budget)
    questions = read_questions(index, cfg.types, cfg.limit, bad)
    training, training_bad = training_questions(cfg)
    asked = {question.sample for question in questions}
    without = 0 if cfg.limit else len(index) - len(asked) - len(bad)
    questions = [questions[n] for n in scorable(scorer, [question.reference for question in questions], bad)]
    prompt = told_prompt(trained, cfg.template)
    longest = cfg.max_new_tokens or (REASONING_TOKENS if metric == "scienceqa" else ANSWER_TOKENS)
    answerer = Answerer(place(restore(folder)[0], cfg.trainer), prompt, trained.data, longest)
    # Answers are saved by the place of their question; which questions there are depends on the metric, too.
    settings = {**asdict(prompt), "max_new_tokens": longest, "metric": metric}
    settings |= {"data": index.hash, "types": list(cfg.types), "limit": cfg.limit, "history": cfg.history}
    settings["parts"] = content_hashes(folder)
    unfinished = AnswerFile(out / "answers.unfinished.jsonl", settings)
    replies = predict(answerer, index, questions, cfg.batch_size, unfinished, bad, cfg.history == "own")
    answered = [(question, text) for question, text in zip(questions, replies, strict=True) if text is not None]
    if not answered:
        bad.refuse_all("questions")
    # Again, because some scores need all questions about an image.
    places = scorable(scorer, [question.reference for question, _ in answered], bad)
    questions, predictions = [answered[n][0] for n in places], [answered[n][1] for n in places]
    unfinished_blind = AnswerFile(out / "blind.unfinished.jsonl", {**settings, "blind": cfg.blind})
    how = (cfg.history == "own", unfinished_blind, "answering without pictures")
    blind = answer_blind(answerer, index, questions, cfg.batch_size, cfg.blind, *how)
    scores, summary = answer_scores(scorer, questions, predictions, training, blind)
    left_out = {"bad_samples": bad.as_json(), "samples_without_question": without}
    if training_bad:
        left_out["bad_samples_of_train_from"] = training_bad.as_json()
    write_scores(out, {"metric": metric, **summary, **left_out})
    write_predictions(out, questions, predictions, scores.each, blind)
    if metric == "scienceqa":
        layout = result_layout(predictions, [question.reference for question in questions])
        write_json(out / "results.json", layout, indent=2)
    with replacing(out / "grid.png") as draft:
        draw_grid(index, questions, predictions, scores, summary).save(draft)
    write_text(out / "worst.html", worst_page(index, questions, predictions, scores, summary, blind))
    unfinished.remove()
    unfinished_blind.remove()
    print(table(summary, scores.main))
    print(*notes_of(summary), sep="\n")
    if without:
        print(f"{without:,} of {len(index):,} samples have no question{' of these types' * bool(cfg.types)}")
    print_bad(bad, training_bad)
    print(f"pictures with answers: {out / 'grid.png'}; the worst: {out / 'worst.html'}")


def training_questions(cfg: DictConfig) -> tuple[list[Question] | None, BadSamples | None]:
    """The questions of the training set, from which baselines are taken, and its samples that are left out."""
    if cfg.data.train_from is None:
        return None, None
    index = ShardIndex.open(cfg.data.train_from)
    bad = BadSamples(index.root, len(index), cfg.data.bad_budget)
    return read_questions(index, bad=bad), bad


def score_descriptions(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Ask a vision-language model for descriptions and count the incoherent ones; the same command resumes it."""
    prompt = description_prompt(trained, cfg.template)
    # Read before the model is loaded, so that a wrong path or a missing caption costs no time.
    pictures = PictureSet(cfg.data.path, ImageSpec(1), cfg.limit, cfg.data.bad_budget)
    questions = described.caption_questions(pictures) if cfg.metric == "captions" else {}
    longest = cfg.max_new_tokens or DESCRIPTION_TOKENS
    answerer = Answerer(place(restore(folder)[0], cfg.trainer), prompt, trained.data, longest)
    about = {"template": prompt.template, "max_new_tokens": longest}
    settings = {**asdict(prompt), **about, "data": pictures.index.hash, "limit": cfg.limit}
    unfinished = AnswerFile(out / "descriptions.unfinished.jsonl", {"parts": content_hashes(folder), **settings})
    blind = None if cfg.blind == 0 else BlindAnswerer(answerer)
    replies = described.describe(answerer, pictures, cfg.batch_size, unfinished, blind)
    verdicts = described.judge(replies)
    scores = described.description_scores(replies, verdicts)
    described.write_descriptions(out, replies, verdicts)
    if questions:
        pairs = [(questions[reply.place], reply.text) for reply in replies if reply.place in questions]
        asked, texts = [question for question, _ in pairs], [text for _, text in pairs]
        caption_scores = captions(texts, [question.reference for question in asked])
        scores |= {name: value for name, value in caption_scores.all.items() if name not in ("questions", "words")}
        unseen = [reply.blind for reply in replies if reply.place in questions]
        blind_texts = {n: text for n, text in enumerate(unseen) if text is not None}
        baselines = with_baselines(captions, texts, [question.reference for question in asked], blind=blind_texts)
        scores |= baselines
        summary = {**caption_scores.as_json(), **baselines}
        page = worst_page(pictures.index, asked, texts, caption_scores, summary, blind_texts)
        write_text(out / "worst.html", page)
    unfinished.remove()
    sheets = {"grid": described.description_sheet(pictures, replies, verdicts, scores)}
    report({"run": folder.name, **scores, **about}, sheets, out, pictures.bad)


def score_texts(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Measure how well a language model predicts the answers, in the form of its training."""
    index = ShardIndex.open(cfg.data.path)
    bad = BadSamples(index.root, len(index), cfg.data.bad_budget)
    data = ImageTextDataConfig(max_length=trained.data.max_length)
    model = place(restore(folder)[0], cfg.trainer)
    what = (trained_prompt(trained), index, bad, UNTYPED, cfg.types, cfg.limit, cfg.batch_size)
    scores = perplexities(model.language, data, *what)
    write_scores(out, {"metric": "perplexity", **scores, "bad_samples": bad.as_json()})
    print(table(scores, "perplexity"))
    print_bad(bad)


SCORINGS = {
    "answers": score_answers,
    "describes": score_descriptions,
    "writes": score_texts,
    "compares": score_matching,
    "reconstructs": score_first_stage,
    "draws": score_generator,
}
