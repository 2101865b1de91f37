"""The scorings of `mmlab eval`: of answers, descriptions, texts, reconstructions and samples."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from mmlab.config.errors import ConfigError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.config import ImageTextDataConfig
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate import descriptions as described
from mmlab.evaluate.answer_report import answer_scores, draw_grid, notes_of, predict, worst_page, write_predictions
from mmlab.evaluate.answers import Answerer, AnswerFile
from mmlab.evaluate.baselines import BlindAnswerer, answer_blind
from mmlab.evaluate.config import AnswerQualityConfig
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, feature_network
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.pictures.reconstructions import reconstruction_sheet, score_reconstructions
from mmlab.evaluate.pictures.rejection import ClassProbe, Rejection
from mmlab.evaluate.pictures.sample_scores import score_samples
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
from mmlab.training.config import HardwareConfig
from mmlab.training.trainer import place
from mmlab.verbs._generators import check_guidance, generator_of, generator_settings
from mmlab.verbs._matching import score_matching

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


def print_bad(*sets: BadSamples | None) -> None:
    """Print a line about each set of shards with samples that are left out."""
    for bad in sets:
        if bad:
            print(f"{bad.root}: {bad}")


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


def score_first_stage(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Encode and decode images with a first stage."""
    inputs = picture_inputs(cfg, trained)
    model = restore_for_pictures(cfg, folder, inputs)
    scores = score_reconstructions(model, inputs.pictures, inputs.network, inputs.train, cfg.batch_size)
    sheets = {"reconstructions": reconstruction_sheet(model.first_stage, inputs.pictures)}
    report({"run": folder.name, **scores}, sheets, out, inputs.pictures.bad, inputs.train_bad)


def score_generator(cfg: DictConfig, folder: Path, trained: DictConfig, out: Path) -> None:
    """Draw samples under the conditions of real images, and compare them with these."""
    if cfg.features is None:
        raise ConfigError(
            "FID and KID need a network; set features to a run of stage=contrastive (experiment=classes/features is "
            "trained on classes), to a pretrained vision encoder, or to inception."
        )
    process, sampler, about = generator_settings(cfg, trained)
    check_rejection(cfg, trained)
    classifier = None if cfg.classifier is None else feature_network(cfg.classifier, cfg.root)
    inputs = picture_inputs(cfg, trained)
    model = restore_for_pictures(cfg, folder, inputs)
    check_guidance(cfg.run, about.get("guidance", 1), model.conditioner)
    assert inputs.network is not None
    rejection = None
    if cfg.candidates > 1:
        if classifier is not None:
            classifier.to(model.first_stage.latent_mean.device)
        assert inputs.train is not None
        probe = ClassProbe(classifier or inputs.network, inputs.train, model.conditioner.names, cfg.batch_size)
        rejection = Rejection(probe, cfg.candidates)
    generator = generator_of(model, trained, process, sampler, None)
    scores, sheets = score_samples(
        generator, inputs.network, inputs.pictures, inputs.train, cfg.samples, cfg.batch_size, cfg.seed, rejection
    )
    scores = {"run": folder.name, **scores, **about, "seed": cfg.seed}
    report(scores, sheets, out, inputs.pictures.bad, inputs.train_bad)


SCORINGS = {
    "answers": score_answers,
    "describes": score_descriptions,
    "writes": score_texts,
    "compares": score_matching,
    "reconstructs": score_first_stage,
    "draws": score_generator,
}


def check_rejection(cfg: DictConfig, trained: DictConfig) -> None:
    """Refuse rejection sampling of a model without classes, or without data to train the classifier on.

    Raises:
        ConfigError: either of them, or a classifier without candidates.
    """
    if cfg.candidates == 1:
        if cfg.classifier is not None:
            raise ConfigError(f"classifier={cfg.classifier} selects among several candidates; set candidates=4 or so.")
        return
    if "classes" not in trained.model.conditioner:
        raise ConfigError(f"candidates={cfg.candidates} needs a class-conditional model, and {cfg.run} is not one.")
    if cfg.data.train_from is None:
        raise ConfigError(f"candidates={cfg.candidates} trains a classifier on labeled images; set data.train_from=…")


class PictureInputs(NamedTuple):
    """What images are compared with: the network may be None, and so may the training pictures."""

    pictures: PictureSet
    train: PictureSet | None
    network: FeatureNetwork | None

    @property
    def train_bad(self) -> BadSamples | None:
        return None if self.train is None else self.train.bad


def picture_inputs(cfg: DictConfig, trained: DictConfig) -> PictureInputs:
    """Open shards and network, before the model is loaded: a wrong name then costs no time."""
    spec = ImageSpec(trained.data.size, trained.data.aspect, reduce_jpegs=trained.data.reduce_jpegs)
    budget, train_from = cfg.data.bad_budget, cfg.data.train_from
    pictures = PictureSet(cfg.data.path, spec, cfg.limit, budget)
    train = None if train_from is None else PictureSet(train_from, spec, budget=budget)
    network = None if cfg.features is None else feature_network(cfg.features, cfg.root)
    return PictureInputs(pictures, train, network)


def restore_for_pictures(cfg: DictConfig, folder: Path, inputs: PictureInputs) -> Any:
    """Restore the model in float32, so that its scores do not depend on the machine, and the network on its device."""
    model = place(restore(folder)[0], HardwareConfig(accelerator=cfg.trainer.accelerator, precision="32-true"))
    if inputs.network is not None:
        inputs.network.to(model.first_stage.latent_mean.device)
    return model


def report(scores: dict, sheets: dict, out: Path, bad: BadSamples, train_bad: BadSamples | None = None) -> None:
    """Write scores and sheets, and print the numbers, one on each line, and the samples that were left out."""
    train_counts = {"bad_samples_of_train_from": train_bad.as_json()} if train_bad else {}
    write_scores(out, {**scores, "bad_samples": bad.as_json(), **train_counts})
    for name, sheet in sheets.items():
        with replacing(out / f"{name}.png") as draft:
            sheet.save(draft)
    groups = {name: scores.get(name) or {} for name in ("neighbours", "rejection")}
    rows = {**scores, **{f"{group}_{name}": value for group, rows in groups.items() for name, value in rows.items()}}
    for name, value in rows.items():
        if isinstance(value, int | float):
            print(f"{name.replace('_', ' '):<28}{value:>12,.4g}")
    for line in described.description_notes(scores):
        print(line)
    if features := scores.get("features"):
        print(f"features: {features['network']}{' (a stand-in: no published FID)' if features['stand_in'] else ''}")
    if reason := scores.get("linear_left_out"):
        print(f"no linear baseline: {reason}")
    for group in (scores, groups["rejection"]):
        if group.get("caution"):
            print(group["caution"])
    print_bad(bad, train_bad)
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in sheets)}")
