"""BLIP-2's three losses: each falls, equals its formula, and its negatives are hard and never the pair itself."""

from typing import Any

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from mmlab.config.errors import ConfigError
from mmlab.stage.config import QFormerPretrainingConfig
from mmlab.stage.qformer_pretraining import contrastive_loss, hard_negatives
from mmlab.training.artifacts import describe_frozen, save_parts
from mmlab.training.filling import fill_parts
from tests.model import tiny
from tests.stage.tiny_stage import data_of, first_batch, fit, make_stage
from tests.tiny_shapes import make_shapes

LEARNS = ["qformer", "words", "contrast", "match"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def build(root, lr: float = 3e-3) -> Any:
    return make_stage(QFormerPretrainingConfig(trainable=LEARNS), tiny.image_text_qformer(root / "tokenizer"), lr)


class Losses(L.Callback):
    """Keeps what is logged at each step."""

    def __init__(self) -> None:
        self.kept: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for name in ("itc", "itm", "itg", "loss"):
            self.kept.setdefault(name, []).append(float(trainer.callback_metrics[f"train/{name}"]))


def test_each_loss_falls_and_the_vision_encoder_stays(root):
    stage, seen = build(root), Losses()
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    fit(stage, data_of(stage, [root / "val"], 4, 4), 100, callbacks=[seen])
    kept = seen.kept
    assert all(sum(parts) == pytest.approx(total, rel=1e-4) for *parts, total in zip(*kept.values(), strict=True))
    for name, losses in kept.items():
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), (name, losses[::10])
    moved = {name for name, value in stage.model.state_dict().items() if not torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in moved} == set(LEARNS)
    assert stage.frozen == ["vision"]


def test_the_first_step_is_the_sum_that_the_paper_states(root):
    """Each loss from the model's own outputs, pair by pair; negatives from the same draw."""
    stage = build(root)
    batch = first_batch(stage, data_of(stage, [root / "train"], 6, 6))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    same = torch.tensor([[bool((a == b).all()) for b in ids] for a in ids])
    assert same.sum() == len(ids), "the captions differ"
    with torch.no_grad():
        losses, found = stage.losses(batch, torch.Generator().manual_seed(3))
        features = stage.model.vision(batch["pixel_values"])
        similar = stage.model.similarities(features, ids, mask)
        rng = torch.Generator().manual_seed(3)
        texts, pictures = hard_negatives(similar, same, rng), hard_negatives(similar.T, same, rng)
        pairs = [(i, i, 1) for i in range(6)]
        pairs += [(int(pictures[i]), i, 0) for i in range(6)] + [(i, int(texts[i]), 0) for i in range(6)]
        total = torch.zeros(())
        for shown, told, fits in pairs:
            row = stage.model.matches(features[shown : shown + 1], ids[told : told + 1], mask[told : told + 1])
            total -= row.log_softmax(1)[0, fits]
        itc = [F.cross_entropy(side, torch.arange(6), label_smoothing=0.1) for side in (similar, similar.T)]
        assert float(losses["itc"]) == pytest.approx(float(sum(itc)) / 2, rel=1e-5)
        assert float(losses["itm"]) == pytest.approx(float(total / 18), rel=1e-4)
        logits = stage.model.captions(features, ids, mask).log_softmax(-1)
        words = []
        for i, length in enumerate(mask.sum(1).tolist()):
            for place in range(length - 1):
                smooth = 0.1 * float(logits[i, place].mean())
                words.append(-0.9 * float(logits[i, place, ids[i, place + 1]]) - smooth)
        assert float(losses["itg"]) == pytest.approx(sum(words) / len(words), rel=1e-4)
        right = (similar.argmax(1) == torch.arange(6)).float().mean()
        assert float(found) == float(right)


def test_captions_end_with_the_end(root):
    stage = build(root)
    for max_length, cut in ((120, False), (6, True)):
        batch = first_batch(stage, data_of(stage, [root / "train"], 6, 6, max_length=max_length))
        begin, end = stage.model.frame
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert kept[0] == begin and kept[-1] == end and kept.count(begin) == 1
            assert len(kept) <= max_length
        assert (batch["stats"]["train"]["truncated"] > 0) == cut


def test_the_contrastive_loss_is_its_formula():
    similar = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    plain = torch.eye(4).bool()
    expected = sum(F.cross_entropy(side, torch.arange(4), label_smoothing=0.1) for side in (similar, similar.T)) / 2
    assert float(contrastive_loss(similar, plain)) == pytest.approx(float(expected), rel=1e-5)
    same = plain.clone()
    same[0, 2] = same[2, 0] = True
    rows = []
    for side in (similar, similar.T):
        log = side.log_softmax(1)
        for i in range(4):
            mine = log[i][same[i]].mean()
            rows.append(-0.9 * mine - 0.1 * log[i].mean())
    assert float(contrastive_loss(similar, same)) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


def test_negatives_are_hard_and_never_the_same():
    similar = torch.tensor([[9.0, 2.0, 0.0, 9.0]]).repeat(2000, 1)
    same = torch.tensor([[True, False, False, True]]).repeat(2000, 1)
    # As the rows of a large batch: each draws for itself.
    drawn = hard_negatives(similar, same, torch.Generator().manual_seed(0)).bincount(minlength=4)
    assert drawn[0] == drawn[3] == 0
    weights = similar[0].softmax(0) + 1e-4
    assert float(drawn[1] / 2000) == pytest.approx(float(weights[1] / (weights[1] + weights[2])), abs=0.03)
    assert drawn[2] > 0


def test_a_batch_of_one_caption_has_no_negatives(root):
    stage = build(root)
    batch = first_batch(stage, data_of(stage, [root / "train"], 4, 4))
    alike = {
        **batch,
        "input_ids": batch["input_ids"][:1].expand(4, -1),
        "attention_mask": batch["attention_mask"][:1].expand(4, -1),
    }
    losses, found = stage.losses(alike)
    assert all(torch.isfinite(value) for value in losses.values()) and float(found) == 1


def test_equal_captions_of_a_batch_are_no_negatives(root):
    stage = build(root)
    batch = first_batch(stage, data_of(stage, [root / "train"], 6, 6))
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[4], mask[4] = ids[1], mask[1]
    shown: list[tuple[torch.Tensor, torch.Tensor]] = []
    matches = stage.model.matches
    stage.model.matches = lambda features, told, mask: shown.append((features, told)) or matches(features, told, mask)
    with torch.no_grad():
        for seed in range(20):
            losses, _ = stage.losses(
                {**batch, "input_ids": ids, "attention_mask": mask}, torch.Generator().manual_seed(seed)
            )
        features = stage.model.vision(batch["pixel_values"])
        same = (ids[:, None] == ids[None]).all(-1)
        similar = stage.model.similarities(features, ids, mask)
    assert float(losses["itc"]) == pytest.approx(float(contrastive_loss(similar, same)), rel=1e-5)
    assert same.sum() == 8
    for pictures, told in shown:
        whose = [int((features - picture).flatten(1).norm(dim=1).argmin()) for picture in pictures]
        assert all(not torch.equal(told[n], ids[whose[n]]) for n in range(6, 18))


def test_validation_draws_nothing_from_training(root):
    stage = build(root).eval()
    stage.log_dict = lambda values, **options: logged.append({k: float(v) for k, v in values.items()})
    batch = first_batch(stage, data_of(stage, [root / "train"], 6, 6))
    logged: list[dict[str, float]] = []
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        stage.validation_step(batch, 0)
        stage.validation_step(batch, 0)
    assert torch.equal(state, torch.get_rng_state()) and logged[0] == logged[1]
    assert set(logged[0]) == {"val/itc", "val/itm", "val/itg", "val/loss", "val/retrieval"}


def test_its_q_former_goes_to_a_language_model(root, tmp_path):
    stage = build(root)
    save_parts(stage.model, LEARNS, tmp_path / "run" / "artifacts", {}, describe_frozen(stage.model, LEARNS))
    model = tiny.minigpt4(root / "tokenizer")
    model.vision = stage.model.vision
    sources = fill_parts(model, [tmp_path / "run"])
    assert set(sources) == {"qformer"}
    features = torch.randn(1, 4, 32)
    assert torch.equal(model.qformer(features), stage.model.qformer(features))
    model.vision = tiny.vision("blip2", feature_layer=-1, features="cls_patch")
    with pytest.raises(ConfigError, match="was trained with another vision"):
        fill_parts(model, [tmp_path / "run"])


def test_what_its_batches_do_not_have_is_refused(root):
    stage = build(root)
    with pytest.raises(ConfigError, match=r"data\.pack=true does not apply"):
        data_of(stage, [root / "train"], pack=True)
    with pytest.raises(ConfigError, match="at most 512 tokens"):
        data_of(stage, [root / "train"], max_length=600)
    with pytest.raises(ConfigError, match="no room for a word"):
        data_of(stage, [root / "train"], max_length=2)
