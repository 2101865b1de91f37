"""Score a trained model: its answers, descriptions, reconstructions or samples, with pictures of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb

ANSWER_TOKENS = 64
REASONING_TOKENS = 1024  # ScienceQA's answer comes last; as LLaVA's published evaluation
DESCRIPTION_TOKENS = 300  # as MiniGPT-4's published demo
OF_SAMPLES = ("sampler", "steps", "guidance", "temperature", "top_k", "top_p", "classifier")
"""Keys that say how pictures are drawn."""


def main(argv: list[str]) -> int:
    return hydra_verb("eval", evaluate, argv)


def evaluate(cfg: DictConfig) -> None:
    """Write scores.json and pictures to `<run>/eval/<name of data.path>`, for what the run's model does:

    it answers questions: exact match per type, or metric=vqa, gqa, pope, mme, scienceqa, facts; data.blind_from is
    training data whose commonest answers to compare with
      mmlab eval run=llava-finetune_tiny data.path=data/shapes/test data.blind_from=data/shapes/train
      mmlab eval run=llava/scienceqa_tiny data.path=data/shapes/problems/test metric=scienceqa max_new_tokens=96
    it describes pictures: shares that repeat themselves, break off or do not end, with metric=captions BLEU, ROUGE-L
    and CIDEr-D too; template=minigpt4 asks as its stage 2 does, describe=false (or types, or data.blind_from) asks the
    questions of the data instead
      mmlab eval run=minigpt4/stage1_tiny data.path=data/shapes/test template=minigpt4
    it encodes pictures: PSNR, SSIM, rFID; data.train_from is training data for a linear code to compare with
      mmlab eval run=emoji/first_stage data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features
    it makes pictures: FID, KID; data.train_from is training data among which to look for copies; candidates=4 also
    scores the quarter of so many samples that a classifier accepts, and samples of all codes, in rows of their own
      mmlab eval run=emoji/class data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features
    """
    from mmlab.config.errors import ConfigError
    from mmlab.runs.disk import no_file
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import learned_captions

    folder = find_run(cfg.run, cfg.root)
    trained = load_run_config(folder)
    if "prompt" in trained.stage:
        about_questions = bool(cfg.types) or cfg.data.blind_from is not None
        if cfg.describe and about_questions:
            raise ConfigError("types and data.blind_from are about questions; leave them out, or give describe=false.")
        describes = cfg.describe
        if describes is None:
            describes = (learned_captions(trained) or cfg.metric == "captions") and not about_questions
        if cfg.metric is not None and (cfg.metric == "captions") != describes:
            does = "describes pictures; its metric is captions" if describes else "answers questions; captions are none"
            raise ConfigError(f"metric={cfg.metric} does not fit: {cfg.run} {does} (describe=true or false chooses).")
        score = descriptions if describes else answers
    elif trained.process is not None or "prior" in trained.model:
        score = samples
    elif "first_stage" in trained.model:
        score = reconstructions
    else:
        raise ConfigError(f"{cfg.run} neither answers questions nor makes pictures, so there is nothing to score.")
    if cfg.metric is not None and score in (samples, reconstructions):
        raise ConfigError(f"metric={cfg.metric} is of answers and descriptions; {cfg.run} makes pictures.")
    drawn = [key for key in OF_SAMPLES if cfg[key] is not None] + ["candidates"] * (cfg.candidates > 1)
    if drawn and score is not samples:
        raise ConfigError(f"{drawn[0]} is about pictures that a model draws, and {cfg.run} draws none; leave it out.")
    score(cfg, folder, no_file(Path(cfg.out or folder / "eval" / Path(cfg.data.path).name)))


def answers(cfg: DictConfig, folder: Path, out: Path) -> None:
    """Ask a vision-language model questions with known answers; killed, the same command goes on."""
    from mmlab.data.index import ShardIndex
    from mmlab.evaluate.answer_report import answer_scores, draw_grid, predict, worst_page, write_predictions
    from mmlab.evaluate.answers import Answerer, KeptAnswers
    from mmlab.evaluate.questions import read_questions
    from mmlab.evaluate.scores.scienceqa_score import result_layout
    from mmlab.evaluate.scores.score import table, write_scores
    from mmlab.evaluate.scores.scorers import scorer_named
    from mmlab.stage.assembly import restore, run_prompt
    from mmlab.training.artifacts import fingerprints
    from mmlab.training.trainer import place

    metric = cfg.metric or "exact"
    scorer, index = scorer_named(metric), ShardIndex.open(cfg.data.path)
    questions = read_questions(index, cfg.types, cfg.limit)
    blind = None if cfg.data.blind_from is None else read_questions(ShardIndex.open(cfg.data.blind_from))
    scorer([None] * len(questions), [question.reference for question in questions])  # refuse what it cannot score now
    model, trained = restore(folder)
    prompt = run_prompt(trained, cfg.template)
    longest = cfg.max_new_tokens or (REASONING_TOKENS if metric == "scienceqa" else ANSWER_TOKENS)
    answerer = Answerer(place(model, cfg.trainer), prompt, trained.data.aspect, longest)
    asked = {**asdict(prompt), "max_new_tokens": longest}
    asked |= {"data": index.hash, "types": list(cfg.types), "limit": cfg.limit}
    kept = KeptAnswers(out / "answers.unfinished.jsonl", {"parts": fingerprints(folder), **asked})
    predictions = predict(answerer, index, questions, cfg.batch_size, kept)
    scores, found = answer_scores(scorer, questions, predictions, blind)
    write_scores(out, {"metric": metric, **found})
    write_predictions(out, questions, predictions, scores.each)
    if metric == "scienceqa":
        layout = result_layout(predictions, [question.reference for question in questions])
        (out / "results.json").write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")
    draw_grid(index, questions, predictions, scores, found.get("blind")).save(out / "grid.png")
    (out / "worst.html").write_text(worst_page(index, questions, predictions, scores), encoding="utf-8")
    kept.remove()
    print(table(found, scores.main))
    print(f"pictures with answers: {out / 'grid.png'}; the worst: {out / 'worst.html'}")


def descriptions(cfg: DictConfig, folder: Path, out: Path) -> None:
    """Ask a vision-language model to describe pictures, and count what is incoherent; killed, it goes on."""
    from mmlab.data.sample import ImageSpec
    from mmlab.evaluate.answer_report import worst_page
    from mmlab.evaluate.answers import Answerer, KeptAnswers
    from mmlab.evaluate.descriptions import (
        caption_questions,
        describe,
        description_scores,
        description_sheet,
        judge,
        write_descriptions,
    )
    from mmlab.evaluate.pictures.picture_set import PictureSet
    from mmlab.evaluate.scores.caption_scores import captions
    from mmlab.runs.run import load_run_config
    from mmlab.stage.assembly import description_prompt, restore
    from mmlab.training.artifacts import fingerprints
    from mmlab.training.trainer import place

    prompt = description_prompt(load_run_config(folder), cfg.template)
    # A wrong path or a missing caption should not cost the loading of a model.
    pictures = PictureSet(cfg.data.path, ImageSpec(1), cfg.limit)
    captioned = caption_questions(pictures) if cfg.metric == "captions" else []
    model, trained = restore(folder)
    longest = cfg.max_new_tokens or DESCRIPTION_TOKENS
    answerer = Answerer(place(model, cfg.trainer), prompt, trained.data.aspect, longest)
    pictures = PictureSet(cfg.data.path, answerer.spec, cfg.limit)
    about = {"template": prompt.template, "max_new_tokens": longest}
    asked = {**asdict(prompt), **about, "data": pictures.index.hash, "limit": cfg.limit}
    kept = KeptAnswers(out / "descriptions.unfinished.jsonl", {"parts": fingerprints(folder), **asked})
    said = describe(answerer, pictures, cfg.batch_size, kept)
    found = judge(said)
    scores = description_scores(said, found)
    write_descriptions(out, said, found)
    if captioned:
        texts = [one.text for one in said]
        beside = captions(texts, [question.reference for question in captioned])
        scores |= {name: value for name, value in beside.all.items() if name not in ("questions", "words")}
        (out / "worst.html").write_text(worst_page(pictures.index, captioned, texts, beside), encoding="utf-8")
    kept.remove()
    report({"run": folder.name, **scores, **about}, {"grid": description_sheet(pictures, said, found, scores)}, out)


def reconstructions(cfg: DictConfig, folder: Path, out: Path) -> None:
    """Encode and decode pictures with a first stage."""
    from mmlab.evaluate.pictures.reconstructions import reconstruction_sheet, score_reconstructions

    model, _, network, pictures, train = everything(cfg, folder)
    scores = score_reconstructions(model, pictures, network, train, cfg.batch_size)
    report({"run": folder.name, **scores}, {"reconstructions": reconstruction_sheet(model.first_stage, pictures)}, out)


def samples(cfg: DictConfig, folder: Path, out: Path) -> None:
    """Draw samples of a generative model under the conditions of real pictures, and compare them with these."""
    from mmlab.config.errors import ConfigError
    from mmlab.evaluate.pictures.feature_networks import feature_network
    from mmlab.evaluate.pictures.generated_scores import score_samples
    from mmlab.evaluate.pictures.rejection import ClassProbe, Rejection
    from mmlab.runs.run import load_run_config
    from mmlab.verbs.sample import check_guidance, with_codes, with_noise

    if cfg.features is None:
        raise ConfigError("FID and KID need a network; give features=<a run of stage=contrastive>, or inception.")
    trained = load_run_config(folder)
    draw, about, _ = (with_noise if trained.process is not None else with_codes)(cfg, trained)
    check_rejection(cfg, trained)
    classifier = None if cfg.classifier is None else feature_network(cfg.classifier, cfg.root)
    model, _, network, pictures, train = everything(cfg, folder)
    check_guidance(cfg.run, about["guidance"], model.conditioner)
    rejection = None
    if cfg.candidates > 1:
        if classifier is not None:
            classifier.to(model.first_stage.latent_mean.device)
        probe = ClassProbe(classifier or network, train, model.conditioner.names, cfg.batch_size)
        rejection = Rejection(probe, cfg.candidates)
    scores, sheets = score_samples(
        draw(model), network, pictures, train, cfg.samples, cfg.batch_size, cfg.seed, rejection
    )
    report({"run": folder.name, **scores, **about, "seed": cfg.seed}, sheets, out)


def check_rejection(cfg: DictConfig, trained: DictConfig) -> None:
    """Refuse rejection sampling where there is no class to tell, or nothing to learn it from."""
    from mmlab.config.errors import ConfigError

    if cfg.candidates == 1:
        if cfg.classifier is not None:
            raise ConfigError(f"classifier={cfg.classifier} accepts one of several candidates; give candidates=4, say.")
        return
    if "classes" not in trained.model.conditioner:
        raise ConfigError(
            f"candidates={cfg.candidates} keeps what a classifier takes for its class, and {cfg.run} is told none;"
            " leave it out."
        )
    if cfg.data.train_from is None:
        raise ConfigError(
            f"candidates={cfg.candidates} needs a classifier, which learns from pictures with classes; give"
            " data.train_from=…"
        )


def everything(cfg: DictConfig, folder: Path) -> tuple[Any, DictConfig, Any, Any, Any]:
    """For scores of pictures: model, the run's config, feature network or None, pictures, training pictures or None."""
    from omegaconf import OmegaConf

    from mmlab.data.sample import ImageSpec
    from mmlab.evaluate.pictures.feature_networks import feature_network
    from mmlab.evaluate.pictures.picture_set import PictureSet
    from mmlab.runs.run import load_run_config
    from mmlab.stage.assembly import restore
    from mmlab.training.trainer import place

    # Shards and network first: a wrong name should not cost the loading of a model.
    data = load_run_config(folder).data
    spec = ImageSpec(data.size, data.aspect)
    pictures = PictureSet(cfg.data.path, spec, cfg.limit)
    train = None if cfg.data.train_from is None else PictureSet(cfg.data.train_from, spec)
    network = None if cfg.features is None else feature_network(cfg.features, cfg.root)
    model, trained = restore(folder)
    # Scores of one model should not depend on the machine.
    model = place(model, OmegaConf.create({"accelerator": cfg.trainer.accelerator, "precision": "32-true"}))
    if network is not None:
        network.to(model.first_stage.latent_mean.device)
    return model, trained, network, pictures, train


def report(scores: dict, sheets: dict, out: Path) -> None:
    """Write scores and sheets, and print the numbers, a line each."""
    from mmlab.evaluate.scores.score import write_scores

    write_scores(out, scores)
    for name, sheet in sheets.items():
        sheet.save(out / f"{name}.png")
    groups = {name: scores.get(name) or {} for name in ("neighbours", "rejection")}
    rows = {**scores, **{f"{group}_{name}": value for group, found in groups.items() for name, value in found.items()}}
    for name, value in rows.items():
        if isinstance(value, int | float):
            print(f"{name.replace('_', ' '):<28}{value:>12,.4g}")
    if features := scores.get("features"):
        print(f"features: {features['network']}{' (a stand-in: no published FID)' if features['stand_in'] else ''}")
    if left_out := scores.get("linear_left_out"):
        print(f"no linear code to compare with: {left_out}")
    for told in (scores, groups["rejection"]):
        if told.get("caution"):
            print(told["caution"])
    print(f"pictures: {', '.join(str(out / f'{name}.png') for name in sheets)}")
