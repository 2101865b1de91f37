"""Stages that train adapters: they alone learn, however a batch is spread, and nothing else is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmlab.config.errors import ConfigError
from mmlab.model.activation_checkpointing import checkpoint_activations
from mmlab.stage.assembly import put_on_adapters
from mmlab.stage.config import EndToEndFinetuningConfig, ProjectorAlignmentConfig
from mmlab.training.config import EMAConfig, LoRAConfig
from mmlab.training.ema import EMA
from tests.model import tiny
from tests.stage.tiny_stage import CAPTIONS, QUESTIONS, data_of, fit, make_stage
from tests.tiny_shapes import make_shapes


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes"))


def adapted(root: Path, *names: str, dropout: float = 0.0, model: Any = None, **options: Any) -> Any:
    """A stage with adapters on some parts, whose weights count as read from somewhere."""
    torch.manual_seed(0)
    model = model or tiny.vlm(root / "tokenizer")
    lora = {name: LoRAConfig(rank=4, alpha=8, dropout=dropout) for name in names}
    config = EndToEndFinetuningConfig(trainable=["connector", *names], prompt=QUESTIONS, lora=lora, **options)
    stage = make_stage(config, model)
    put_on_adapters(stage, names)
    return stage


def weights(stage: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in stage.named_parameters() if weight.requires_grad}


def test_adapters_alone_learn_and_are_saved(root):
    stage = adapted(root, "vision", "language", dropout=0.1)
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    ema = EMA(EMAConfig(decay=0.5))
    watch = fit(stage, data_of(stage, [root / "train"], micro_batch=4), 12, callbacks=[ema], gradient_clip_val=1.0)
    assert sum(watch.losses[-3:]) < sum(watch.losses[:3])
    learns = set(weights(stage))
    assert {name.split(".")[1] for name in learns} == {"vision", "connector", "language"}
    assert all(".lora_" in name for name in learns if ".connector." not in name)
    assert {name for name, value in stage.state_dict().items() if not torch.equal(before[name], value)} == learns
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == learns
    assert {f"model.{name}" for name in ema.average} == learns


@pytest.mark.parametrize(("micro_batch", "devices", "again"), [(2, 1, True), (4, 2, False)])
def test_micro_batches_ranks_and_recomputed_layers_learn_what_one_learns(root, micro_batch, devices, again):
    def train(micro_batch: int, devices: int, again: bool) -> dict[str, torch.Tensor]:
        stage = adapted(root, "vision", "qformer", "language", model=tiny.minigpt4(root / "tokenizer"))
        if again:
            checkpoint_activations(stage.model)
        fit(stage, data_of(stage, [root / "train"], 8, micro_batch), 3, devices, precision="64-true")
        return {name: weight.float() for name, weight in weights(stage).items()}

    torch.testing.assert_close(train(micro_batch, devices, again), train(8, 1, False))


def test_in_mixed_precision_the_base_is_bf16_and_the_adapter_float32(root):
    stage = adapted(root, "language")
    fit(stage, data_of(stage, [root / "train"]), 2, precision="bf16-mixed")
    dtypes = {(weight.requires_grad, weight.dtype) for weight in stage.model.language.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert next(stage.model.connector.parameters()).dtype == torch.float32


def test_in_bf16_adapters_are_rounded_stochastically(root):
    stage = adapted(root, "language")
    fit(stage, data_of(stage, [root / "train"]), 2, precision="bf16-true")
    assert {weight.dtype for weight in stage.model.parameters()} == {torch.bfloat16}
    assert type(stage.optimizers().optimizer).__name__ == "StochasticAdamW"


def test_features_are_cached_unless_the_encoder_has_an_adapter(root):
    for names, size in ((["language"], 12), (["vision"], 0)):
        stage = adapted(root, *names, feature_cache_mb=64)
        fit(stage, data_of(stage, [root / "train"]), 4)
        assert len(stage.cache.entries) == size


def test_align_trains_the_connector_alone(root):
    lora = {"language": LoRAConfig()}
    with pytest.raises(ConfigError, match=r"stage=align trains only the connector"):
        config = ProjectorAlignmentConfig(trainable=["connector", "language"], prompt=CAPTIONS, lora=lora)
        make_stage(config, tiny.vlm(root / "tokenizer"))


def test_an_adapter_needs_weights_that_come_from_somewhere(root):
    stage = make_stage(
        EndToEndFinetuningConfig(trainable=["language"], prompt=QUESTIONS, lora={"language": LoRAConfig()}),
        tiny.vlm(root / "tokenizer"),
    )
    stage.kept = ["language"]
    with pytest.raises(ConfigError, match=r"stage.lora.language: the part has random weights"):
        put_on_adapters(stage, ["language"])
