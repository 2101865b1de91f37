"""Scores of the trained model at the end of a run, logged as metrics of the run, for sweeps to compare."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from mmlab.config.errors import ConfigError
from mmlab.data.bad_samples import BadSamples
from mmlab.data.conversation import asking
from mmlab.data.index import ShardIndex
from mmlab.data.sample_types import ImageSpec
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.baselines import answer_blind
from mmlab.evaluate.config import AnswerQualityConfig, SampleQualityConfig
from mmlab.evaluate.pictures.drawn_samples import PictureConditions, draw_samples
from mmlab.evaluate.pictures.feature_networks import feature_network, features_of
from mmlab.evaluate.pictures.fid import distances
from mmlab.evaluate.pictures.generators import GENERATIVE, stage_generator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.constant_reply import with_baselines
from mmlab.evaluate.scores.score_table import BASELINES
from mmlab.evaluate.scores.scorers import scorable, scorer_named
from mmlab.model.vlm import VisionLanguageModel
from mmlab.training.ema import averaged


class Quality(L.Callback, ABC):
    """Logs scores of the model, with its average weights under `EMA`, in the last validation of a run.

    All ranks compute the same scores, so that none waits for another.

    Raises:
        ConfigError: no validation data.
    """

    name: ClassVar[str]
    """Key of the callback in the config."""
    _ready = False

    @abstractmethod
    def prepare(self, trainer: L.Trainer, module: Any) -> None:
        """Check and open everything before the first step: a wrong name should not cost a run."""

    @abstractmethod
    def scores(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        """The scores by their names, without `val/`."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.datamodule.val_sources or trainer.limit_val_batches == 0:  # type: ignore[attr-defined]
            raise ConfigError(
                f"callbacks.{self.name} scores the last validation, so set data.val; a few samples will do."
            )
        self.prepare(trainer, pl_module)
        self._ready = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self._ready or trainer.sanity_checking or trainer.global_step < trainer.max_steps:
            return
        with averaged(pl_module.model):
            scores = self.scores(trainer, pl_module)
        pl_module.log_dict({f"val/{name}": value for name, value in scores.items()}, rank_zero_only=False)


class AnswerQuality(Quality):
    """Logs a score of generated answers: `val/accuracy`, and `val/accuracy/<type>`; of `facts`, `val/facts` and so on.

    Beside it are the scores without pictures, see `with_baselines`: `val/accuracy_blind`, `val/accuracy_gain` and
    `val/accuracy_constant`, and the replies' variety, `val/distinct_replies` and `val/commonest_reply`, a share.

    Decoding is greedy, as in `mmlab eval`, which gives the same numbers later.

    Args:
        config: settings.

    Raises:
        ConfigError: a model that does not answer questions, or no validation data.
        DataError: no such shards, or questions that the metric cannot score.
    """

    name = "answer_quality"

    def __init__(self, config: AnswerQualityConfig):
        self.config = config
        self.scorer = scorer_named(config.metric)

    def prepare(self, trainer: L.Trainer, module: Any) -> None:
        if not isinstance(module.model, VisionLanguageModel):
            raise ConfigError(
                "callbacks.answer_quality needs a model that answers questions about images; use it with stage=align, "
                "finetune or qformer_align."
            )
        self.prompt = asking(module.config.prompt, self.config.template)
        self.index = ShardIndex.open(self.config.questions)
        self.bad = BadSamples(self.index.root, len(self.index))
        self.questions = read_questions(self.index, self.config.types, self.config.limit, self.bad)
        places = scorable(self.scorer, [question.reference for question in self.questions], self.bad)
        self.questions = [self.questions[n] for n in places]
        self.references = [question.reference for question in self.questions]

    def scores(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        data = trainer.datamodule.config  # type: ignore[attr-defined]
        answerer = Answerer(module.model, self.prompt, data, self.config.max_new_tokens)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            batch_size = self.config.batch_size
            answers = dict(answer_questions(answerer, self.index, self.questions, batch_size, self.bad))
            blind = answer_blind(answerer, self.index, self.questions, batch_size, self.config.blind)
        if self.bad:
            rank_zero_warn(f"callbacks.{self.name}: {self.bad}")
        if not answers:
            self.bad.refuse_all("questions")
        answered = sorted(answers)
        places = [answered[n] for n in scorable(self.scorer, [self.references[n] for n in answered], self.bad)]
        replies, references = [answers[n] for n in places], [self.references[n] for n in places]
        scores = self.scorer(replies, references)
        rows = {scores.main: scores.all} | {f"{scores.main}/{name}": row for name, row in scores.types.items()}
        blind = {n: blind[place] for n, place in enumerate(places) if place in blind}
        beside = with_baselines(self.scorer, replies, references, blind=blind)
        rows |= {f"{scores.main}_{name}": beside[name] for name in BASELINES if name in beside}
        values = {name: row.get(scores.main) for name, row in rows.items()}
        values[f"{scores.main}_gain"] = beside["blind"]["gain"] if blind else None
        values["distinct_replies"] = float(beside["replies"]["distinct"])
        values["commonest_reply"] = beside["replies"]["commonest_share"]
        return {name: value for name, value in values.items() if value is not None}


class SampleQuality(Quality):
    """Logs `val/fid` and `val/kid` of samples that the run's sampler draws.

    The n-th sample has the seed n, and conditions are those of the images, as in `mmlab eval`, which gives the same
    numbers later.

    Args:
        config: settings.

    Raises:
        ConfigError: no such run, a stage that does not generate images, or no validation data.
        DataError: no such shards, or latents instead of images.
    """

    name = "sample_quality"

    def __init__(self, config: SampleQualityConfig):
        self.config = config

    def prepare(self, trainer: L.Trainer, module: Any) -> None:
        if not isinstance(module.model, GENERATIVE):
            raise ConfigError(
                "callbacks.sample_quality needs a generative model; use it with stage=latent_diffusion or code_prior."
            )
        size = trainer.datamodule.config.size  # type: ignore[attr-defined]
        self.pictures = PictureSet(self.config.pictures, ImageSpec(size, self.config.aspect))
        if len(self.pictures) < 2:
            raise ConfigError(
                f"callbacks.sample_quality.pictures={self.config.pictures} has {len(self.pictures)} image, and FID"
                " compares two or more."
            )
        network = feature_network(self.config.features, self.config.root).to(trainer.strategy.root_device)
        network(self.pictures.first()[None])
        self.network = network
        self.conditions = PictureConditions(module.model, self.pictures, self.config.samples)

    def scores(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        generator = stage_generator(module, trainer.datamodule)  # type: ignore[attr-defined]
        count, batch_size = self.config.samples, self.config.batch_size
        samples = draw_samples(generator, self.conditions, self.network, count, batch_size)
        scores = distances(samples.features, features_of(self.pictures, self.network, batch_size))
        return {name: scores[name] for name in ("fid", "kid")}
