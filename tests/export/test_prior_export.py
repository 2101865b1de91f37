"""An exported prior writes the same pictures without mmlab."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmlab.config.errors import ConfigError
from mmlab.export.code_pipeline import _choose
from mmlab.export.prior_export import export_prior
from mmlab.model.code_sampling import sample_codes
from mmlab.model.config import GumbelQuantizerConfig
from mmlab.model.first_stage import to_uint8
from mmlab.model.gumbel_quantizer import GumbelQuantizer
from tests.model import tiny_autoencoders as tiny
from tests.model.tiny_priors import CODES, KINDS, NAMES, SIDE, conditions, prior_model, sampling

TEXTS = ["red circle", "what color is the red circle?", ""]


def load(out: Path) -> Any:
    """The exported pipeline, through its own file."""
    spec = spec_from_file_location("exported_loader", out / "loader.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not any(name.startswith("mmlab") for name in vars(module))
    return module.Pipeline(out)


def greedy(model: Any, scale: float, parts: tuple[Any, Any]) -> Tensor:
    sampler = sampling(temperature=0, guidance=scale)
    return sample_codes(model.prior, sampler, torch.zeros(3, SIDE, SIDE, dtype=torch.float64), *parts)


@pytest.mark.parametrize(
    ("kind", "scale"), [("class", 1.0), *((kind, 1.0 if kind == "none" else 2.5) for kind in KINDS)]
)
@torch.no_grad()
def test_it_writes_the_same_pictures(tmp_path, kind, scale, tokenizer_folder):
    model: Any = prior_model(kind, tokenizer_folder)
    line = export_prior(model, sampling(top_k=5), 16, tmp_path / "out")
    assert line == f'Pipeline("{tmp_path}/out")  # from {tmp_path}/out/loader.py'
    pipeline = load(tmp_path / "out")
    told: Any = {"class": list(NAMES), "context": [0, "square", 2], "text": TEXTS, "hidden": TEXTS}.get(kind)
    parts = conditions(model)
    if kind == "map":
        told = tiny.pictures(3)
        codes = model.map_stage.codes(told)
        parts = model.condition({"map_codes": codes}), model.condition({"map_codes": codes}, torch.ones(3).bool())
    expected = greedy(model, scale, parts)
    assert torch.equal(pipeline.codes(told, 3, guidance=scale, temperature=0), expected)
    pixels = to_uint8(model.first_stage.decode_codes(expected))
    pictures = pipeline(told, 3, guidance=scale, temperature=0)
    for picture, wanted in zip(pictures, pixels, strict=True):
        assert np.abs(np.array(picture).transpose(2, 0, 1).astype(int) - wanted.numpy()).max() <= 1
    drawn = pipeline.codes(told, 3, guidance=scale, top_k=4, top_p=0.8, seed=1)
    assert drawn.max() < CODES and not torch.equal(drawn, expected)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"top_p": 0.01}, {"top_k": 3, "top_p": 0.6}]
)
def test_it_draws_a_code_as_often_as_the_sampler_does(how):
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])  # 0.64, 0.09, 0.24, 0.03
    every: Any = {"temperature": 1.0, "top_k": None, "top_p": None, **how}
    codes = _choose(logits.expand(4000, -1), **every, drawn=torch.Generator().manual_seed(0))
    share = codes.bincount(minlength=4).double() / 4000
    torch.testing.assert_close(share, sampling(**how).probabilities(logits)[0], rtol=0, atol=0.03)


def test_a_class_that_it_does_not_know(tmp_path):
    export_prior(prior_model("class"), sampling(), 16, tmp_path / "out")
    pipeline = load(tmp_path / "out")
    for name in ("sqare", len(NAMES), -1):
        with pytest.raises(ValueError, match=f"There is no class '{name}'; the classes are circle, square, star"):
            pipeline([name])
    assert torch.equal(pipeline.codes(torch.tensor([2, 0])), pipeline.codes([NAMES[2], "0"]))


@torch.no_grad()
def test_transformers_own_generate_writes_them_too(tmp_path):
    from transformers import GPT2LMHeadModel

    model = prior_model("class")
    export_prior(model, sampling(), 16, tmp_path)
    prior: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "prior")
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["first_token"], card["start"], card["classes"]) == (CODES, None, list(NAMES))
    front = torch.arange(3)[:, None] + card["first_token"]
    written = prior.generate(front, do_sample=False, attention_mask=torch.ones_like(front))[:, 1:]
    assert torch.equal(written.view(3, SIDE, SIDE), greedy(model, 1.0, conditions(model)))


def test_the_exported_model_is_a_copy(tmp_path):
    model = prior_model("map")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_prior(model, sampling(), 16, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "card.json", "first_stage", "loader.py", "map_stage", "prior",
    ]  # fmt: skip


def test_codes_that_are_not_the_nearest_stay_here(tmp_path):
    model = prior_model("class")
    model.first_stage.quantizer = GumbelQuantizer(GumbelQuantizerConfig(codes=CODES, width=4))
    with pytest.raises(ConfigError, match="VQModel chooses the nearest code; it cannot represent a GumbelQuantizer"):
        export_prior(model, sampling(), 16, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rotary_positions_stay_here(tmp_path):
    with pytest.raises(ConfigError, match=r"GPT-2 has learned positions, .* its weights are in the run's artifacts"):
        export_prior(prior_model("class", positions="rotary"), sampling(), 16, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "exported_loader" not in sys.modules
