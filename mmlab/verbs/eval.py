"""Score a trained model: its answers, descriptions, reconstructions or samples, with images of them."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mmlab.config.compose import hydra_verb
from mmlab.verbs._score_sweep import scores_folder, sweep

DRAWING = ("sampler", "steps", "guidance", "temperature", "top_k", "top_p", "ema", "classifier")
"""Keys that apply only to models that draw pictures."""


def main(argv: list[str]) -> int:
    return hydra_verb("eval", evaluate, argv, sweep)


def evaluate(cfg: DictConfig) -> Path:
    """Write scores.json and images to `<run>/eval/<name of data.path>`. What is scored depends on the run's model.

    A model that answers questions: exact match per type, or metric=vqa, gqa, pope, mme, scienceqa, facts.
    Beside it stand the scores of the same model with blank pictures (blind), of the most common answer to the same
    question in training (data.train_from), and of one reply to all questions of a type (constant).
      mmlab eval run=llava-finetune_tiny data.path=data/shapes/test data.train_from=data/shapes/train
      mmlab eval run=llava/scienceqa_tiny data.path=data/shapes/problems/test metric=scienceqa max_new_tokens=96
    A model that describes images: the shares of descriptions that repeat themselves, break off or do not end; with
    metric=captions also BLEU, ROUGE-L and CIDEr-D. template=minigpt4 uses the prompt of MiniGPT-4's stage 2.
    describe=false (or types, or data.train_from) asks the questions in the data instead.
      mmlab eval run=minigpt4/stage1_tiny data.path=data/shapes/test template=minigpt4
    A model that compares images and texts: recall of captions and images, and accuracy of classes by their names.
      mmlab eval run=llava-vision_tiny data.path=data/shapes/test 'class_prompts=["a picture of a {}."]'
    A language model: the perplexity of the answers, per type; with metric=exact (or vqa, …) its own answers.
      mmlab eval run=llava-language_tiny data.path=data/shapes/test
    A model that reconstructs images: PSNR, SSIM, rFID. data.train_from is training data for a PCA baseline.
      mmlab eval run=emoji/first_stage data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features
    A model that draws images: FID, KID. data.train_from is training data in which to look for copies. candidates=4
    also scores the best quarter of four times as many samples according to a classifier, and unrestricted samples.
    ema=0.05 draws with averaged weights, of a run with callbacks.posthoc_ema. -m also writes a table and curves of FID.
      mmlab eval -m run=emoji/class data.path=data/emoji/val features=emoji/features ema=0.03,0.05,0.1
    Scores of images are repeated from their file, which holds all settings.
      mmlab eval run=emoji/class data.path=data/emoji/val data.train_from=data/emoji/train features=emoji/features
      mmlab eval scores=runs/emoji-class/eval/val/scores.json
    """
    from mmlab.runs.run import find_run, load_run_config
    from mmlab.stage.assembly import kind_of
    from mmlab.verbs._scorings import SCORINGS

    folder = find_run(cfg.run, cfg.root)
    trained = load_run_config(folder)
    kind = what_to_score(cfg, kind_of(trained))
    refuse_other_keys(cfg, kind)
    out = scores_folder(cfg, folder)
    SCORINGS[kind](cfg, folder, trained, out)
    return out


def what_to_score(cfg: DictConfig, kind: str) -> str:
    """The kind of output to score: the model's own kind; a vision-language model's answers or descriptions as asked.

    Raises:
        ConfigError: it is not known what the model does, or the keys contradict each other.
    """
    from mmlab.config.errors import ConfigError

    if kind == "writes" and cfg.metric not in (None, "captions"):
        return "answers"
    if kind in ("reconstructs", "draws", "writes", "compares"):
        return kind
    if kind not in ("answers", "describes"):
        # Only a user's own class; see `kind_of`.
        raise ConfigError(
            f"The model of {cfg.run} is derived from none of mmlab's models, so it is not known what to score; "
            "derive its class from the one that does the same."
        )
    needs_questions = bool(cfg.types) or cfg.data.train_from is not None
    if cfg.describe and needs_questions:
        raise ConfigError("types and data.train_from apply to questions; leave them out, or set describe=false.")
    if cfg.describe is not None:
        return "describes" if cfg.describe else "answers"
    return "describes" if (kind == "describes" or cfg.metric == "captions") and not needs_questions else "answers"


def refuse_other_keys(cfg: DictConfig, kind: str) -> None:
    """Refuse keys that do not apply to what is scored.

    Raises:
        ConfigError: the first of them.
    """
    from mmlab.config.errors import ConfigError

    if kind in ("writes", "compares"):
        refused = ("metric", "describe", "template", "max_new_tokens", "data.train_from")
        if keys := [key for key in refused if OmegaConf.select(cfg, key) is not None]:
            what = "is a language model, whose score is its perplexity, or with metric=exact that of its answers"
            what = what if kind == "writes" else "compares images and texts, and is scored by what it finds"
            raise ConfigError(f"{cfg.run} {what}; leave out {keys[0]}.")
    unasked = ["types"] * (bool(cfg.types) and kind not in ("answers", "writes"))
    unasked += ["history=own"] * (cfg.history == "own" and kind != "answers")
    if unasked:
        raise ConfigError(f"{unasked[0]} applies to questions, and {cfg.run} is asked none here; leave it out.")
    for key in ("classes", "class_prompts"):
        if cfg[key] and kind != "compares":
            raise ConfigError(f"{key} applies only to models that compare images and texts, and {cfg.run} does not.")
    if cfg.metric is not None and kind in ("draws", "reconstructs"):
        raise ConfigError(f"metric={cfg.metric} applies to answers and descriptions; {cfg.run} makes pictures.")
    if cfg.metric is not None and (cfg.metric == "captions") != (kind == "describes"):
        reason = "describes images, so its metric is captions" if kind == "describes" else "answers questions"
        raise ConfigError(f"metric={cfg.metric} does not fit: {cfg.run} {reason} (see describe=true or false).")
    if cfg.scores is not None and kind not in ("draws", "reconstructs"):
        raise ConfigError(f"scores repeats scores of images, and {cfg.run} makes none; leave it out.")
    keys = [key for key in DRAWING if cfg[key] is not None] + ["candidates"] * (cfg.candidates > 1)
    if keys and kind != "draws":
        raise ConfigError(f"{keys[0]} applies only to models that draw images, and {cfg.run} does not; leave it out.")
