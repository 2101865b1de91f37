"""Scores of the trained model at the end of a run, as metrics of the run: what sweeps compare."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.config import Prompt
from mmlab.data.conversation import asking
from mmlab.data.index import ShardIndex
from mmlab.data.sample import ImageSpec
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.pictures.drawn_samples import draw_samples, features_of
from mmlab.evaluate.pictures.feature_networks import FeatureNetwork, feature_network
from mmlab.evaluate.pictures.fid import compare
from mmlab.evaluate.pictures.generators import BorrowedConditions, stage_generator
from mmlab.evaluate.pictures.picture_set import PictureSet
from mmlab.evaluate.questions import Question, read_questions
from mmlab.evaluate.scores.scorers import scorer_named
from mmlab.model.vlm import VisionLanguageModel


def refuse_no_last_validation(trainer: L.Trainer, callback: str) -> None:
    """Raise ConfigError where a run would end without a validation, and so without the score of a callback."""
    if not trainer.datamodule.val_sources or trainer.limit_val_batches == 0:  # type: ignore[attr-defined]
        raise ConfigError(f"callbacks.{callback} scores the last validation; give data.val, if only a few samples.")
    batches = trainer.val_check_interval
    # A share of an epoch, which spans the run, where no number of batches was given.
    every = batches // trainer.accumulate_grad_batches if isinstance(batches, int) else trainer.max_steps
    if trainer.max_steps % every:
        raise ConfigError(
            f"callbacks.{callback} scores the last validation, and trainer.val_every={every} has none after "
            f"{trainer.max_steps} steps; let it divide them."
        )


class AnswerQuality(L.Callback):
    """Logs a score of generated answers in the last validation of a run: `val/accuracy`, and `val/accuracy/<type>`.

    The name is that of the metric's main number (`val/facts` of `facts`). Greedy, as in `mmlab eval`, which gives the
    same numbers later. Every rank answers the same questions, so none waits for another in vain.

    Args:
        questions: folder of shards with questions.
        metric: a scorer's name.
        template: to ask in; None is the one that the run is trained with.
        types: question types to keep; none keeps all.
        limit: at most this many questions.
        batch_size: how many at a time.
        max_new_tokens: longest answer.

    Raises:
        ConfigError: an unknown metric, a stage whose model answers no questions, or no validation at the end.
        DataError: no such shards, or questions that the metric cannot score.
    """

    def __init__(
        self,
        questions: str,
        metric: str = "exact",
        template: str | None = None,
        types: Sequence[str] = (),
        limit: int | None = None,
        batch_size: int = 64,
        max_new_tokens: int = 64,
    ):
        self.questions = questions
        self.scorer = scorer_named(metric)
        self.template = template
        self.types = types
        self.limit = limit
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self._opened: tuple[ShardIndex, list[Question], Prompt] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # Opened before the first step: a wrong name should not cost a run.
        if not isinstance(pl_module.model, VisionLanguageModel):
            raise ConfigError(
                "callbacks.answer_quality asks about pictures; it goes with stage=align, finetune and qformer_align."
            )
        refuse_no_last_validation(trainer, "answer_quality")
        prompt = asking(pl_module.prompt, self.template)
        index = ShardIndex.open(self.questions)
        questions = read_questions(index, self.types, self.limit)
        self.scorer([None] * len(questions), [question.reference for question in questions])
        self._opened = index, questions, prompt

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._opened is None or trainer.sanity_checking or trainer.global_step < trainer.max_steps:
            return
        index, questions, prompt = self._opened
        aspect = trainer.datamodule.collate.image.aspect  # type: ignore[attr-defined]
        answerer = Answerer(pl_module.model, prompt, aspect, self.max_new_tokens)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            answers = dict(answer_questions(answerer, index, questions, self.batch_size))
        scores = self.scorer([answers[n] for n in range(len(questions))], [q.reference for q in questions])
        rows = {scores.main: scores.all} | {f"{scores.main}/{name}": row for name, row in scores.types.items()}
        known = {f"val/{name}": row[scores.main] for name, row in rows.items() if row.get(scores.main) is not None}
        pl_module.log_dict(known, rank_zero_only=False)


class SampleQuality(L.Callback):
    """Logs `val/fid` and `val/kid` in the last validation of a run, of its sampler and, under `EMA`, of the average.

    The n-th sample has the seed n, and conditions are those of the pictures, as in `mmlab eval`, which gives the same
    numbers later. Every rank draws the same samples, so none waits for another in vain.

    Args:
        features: network whose features are compared: a run of stage=contrastive, or `inception`.
        pictures: folder of shards to compare with.
        aspect: how their pictures become square.
        samples: how many are drawn.
        batch_size: how many at a time.
        root: where runs lie.

    Raises:
        ConfigError: no such run, a stage that does not generate, fewer than two samples, or no validation at the end.
        DataError: no such shards, or latents in place of pictures.
    """

    def __init__(
        self,
        features: str,
        pictures: str,
        aspect: str = "stretch",
        samples: int = 1000,
        batch_size: int = 64,
        root: str = "runs",
    ):
        self.features = features
        self.pictures = pictures
        self.aspect = aspect
        self.samples = samples
        self.batch_size = batch_size
        self.root = root
        self._opened: tuple[FeatureNetwork, PictureSet, BorrowedConditions] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Opened before the first step: a wrong name should not cost a run.
        generator = stage_generator(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        if generator is None:
            raise ConfigError(
                "callbacks.sample_quality draws samples; it goes with stage=latent_diffusion and code_prior."
            )
        if self.samples < 2:
            raise ConfigError(f"callbacks.sample_quality.samples={self.samples}: a distance needs two samples or more.")
        refuse_no_last_validation(trainer, "sample_quality")
        spec = ImageSpec(generator.size, self.aspect)
        pictures = PictureSet(self.pictures, spec)
        network = feature_network(self.features, self.root).to(trainer.strategy.root_device)
        network(pictures.picture(0)[None])
        self._opened = network, pictures, BorrowedConditions(generator.model, pictures, self.samples)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._opened is None or trainer.global_step < trainer.max_steps:
            return
        network, pictures, conditions = self._opened
        generator = stage_generator(pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        assert generator is not None
        drawn = draw_samples(generator, conditions, network, self.samples, self.batch_size)
        distances = compare(drawn.features, features_of(pictures, network, self.batch_size))
        pl_module.log_dict({"val/fid": distances["fid"], "val/kid": distances["kid"]}, rank_zero_only=False)
