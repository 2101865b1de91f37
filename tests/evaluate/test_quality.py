"""Scores of a run's answers at its end."""

from pathlib import Path
from typing import Any

import pytest

from mmlab.config.errors import ConfigError, DataError
from mmlab.data.config import ImageTextDataConfig, Prompt
from mmlab.data.index import ShardIndex
from mmlab.evaluate.answer_report import answer_scores, predict
from mmlab.evaluate.answers import Answerer
from mmlab.evaluate.baselines import answer_blind
from mmlab.evaluate.callbacks.quality import AnswerQuality
from mmlab.evaluate.config import AnswerQualityConfig
from mmlab.evaluate.questions import read_questions
from mmlab.evaluate.scores.scorers import exact
from mmlab.stage.config import ProjectorAlignmentConfig
from tests.evaluate.test_sample_sheets import Watch, stage_of, train
from tests.tiny_shapes import make_shapes

STRETCH = ImageTextDataConfig(aspect="stretch")
VARIETY = ("val/distinct_replies", "val/commonest_reply")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"), train=12, val=6)


def quality_of(root: Path, **settings: Any) -> AnswerQuality:
    return AnswerQuality(AnswerQualityConfig(**{"questions": str(root / "val"), **settings}))


def logged(stage: Any) -> dict[str, float]:
    return {name: float(value) for name, value in stage.trainer.callback_metrics.items()}


def test_it_equals_a_later_evaluation_and_does_not_change_training(root, tmp_path, monkeypatch):
    asked = []
    complete = Answerer.complete
    monkeypatch.setattr(Answerer, "complete", lambda *args: asked.append(args[0].prompt) or complete(*args))
    scored, plain = Watch(), Watch()
    quality = quality_of(root, max_new_tokens=3, batch_size=9)
    stage = train(root, tmp_path, stage_of(root), scored, quality)
    questions = len(read_questions(ShardIndex.open(root / "val")))
    once = -(-questions // 9)
    assert once < len(asked) <= 2 * once, "of four validations only the last is scored, and is asked blind, too"
    monkeypatch.undo()
    assert logged(train(root, tmp_path, stage_of(root), plain)).keys() == logged(stage).keys() - {
        name for name in logged(stage) if name.startswith("val/accuracy") or name in VARIETY
    }
    assert scored.seen == plain.seen
    index = ShardIndex.open(root / "val")
    found = read_questions(index)
    answerer = Answerer(stage.model.eval(), asked[0], STRETCH, 3)
    replies, blind = predict(answerer, index, found, 9), answer_blind(answerer, index, found, 9)
    scores, summary = answer_scores(exact, found, replies, blind=blind)  # type: ignore[arg-type]
    expected = {"val/accuracy": scores.all["accuracy"], "val/accuracy_gain": summary["blind"]["gain"]}
    expected |= {f"val/accuracy_{name}": summary[name]["accuracy"] for name in ("blind", "constant")}
    expected |= {f"val/accuracy/{name}": row["accuracy"] for name, row in scores.types.items()}
    expected |= dict(zip(VARIETY, (summary["replies"]["distinct"], summary["replies"]["commonest_share"]), strict=True))
    shown = {name: value for name, value in logged(stage).items() if "accuracy" in name or name in VARIETY}
    assert shown == pytest.approx(expected)
    assert len(expected) > 9


def test_another_metric_types_and_a_limit(root, tmp_path):
    quality = quality_of(root, metric="facts", types=["color", "count"], limit=5, max_new_tokens=2, blind=0)
    names = logged(train(root, tmp_path, stage_of(root), quality, steps=1)).keys()
    expected = {"val/facts", "val/facts/color", "val/facts/count", "val/facts_constant"}
    assert {name for name in names if "facts" in name} == expected


def test_stage_1_needs_a_template(root, tmp_path):
    plain = stage_of(root, Prompt(template="plain"), ProjectorAlignmentConfig)
    with pytest.raises(ConfigError, match="template=v1"):
        train(root, tmp_path, plain, quality_of(root), steps=1)
    plain = stage_of(root, Prompt(template="plain"), ProjectorAlignmentConfig)
    quality = quality_of(root, template="v1", limit=4, max_new_tokens=2)
    assert "val/accuracy" in logged(train(root, tmp_path, plain, quality, steps=1))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"metric": "exakt"}, ConfigError, "Did you mean 'exact'"),
        ({"metric": "scienceqa"}, DataError, "compares letters"),
        ({"types": ["colour"]}, DataError, "Did you mean 'color'"),
        ({"questions": "nowhere"}, DataError, "nowhere"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_first_step(root, tmp_path, options, error, sentence):
    watch = Watch()
    with pytest.raises(error, match=sentence):
        train(root, tmp_path, stage_of(root), watch, quality_of(root, **options))
    assert watch.seen == []


def test_it_scores_the_end_whatever_the_interval_of_validations(root, tmp_path):
    quality = quality_of(root, limit=4, max_new_tokens=2)
    assert "val/accuracy" in logged(train(root, tmp_path, stage_of(root), quality, steps=4, val_every=3))
