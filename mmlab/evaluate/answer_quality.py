"""How well a vision-language model answers, as a metric of the run itself: what sweeps compare."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from mmlab.config.errors import ConfigError
from mmlab.data.conversation import Prompt, asking
from mmlab.data.index import ShardIndex
from mmlab.evaluate.answers import Answerer, answer_questions
from mmlab.evaluate.last_validation import refuse_no_last_validation
from mmlab.evaluate.questions import Question, read_questions
from mmlab.evaluate.scorers import scorer_named
from mmlab.model.vlm import VisionLanguageModel


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
