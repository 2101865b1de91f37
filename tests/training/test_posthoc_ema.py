"""Averages of any width are what all steps' weights give, and their snapshots survive kills bit by bit."""

import math
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.module import ShardDataModule
from mmlab.training import checkpoint_io
from mmlab.training.config import EMAConfig, PostHocEMAConfig
from mmlab.training.ema import EMA
from mmlab.training.ema_snapshots import average_of_run
from mmlab.training.posthoc_ema import PostHocEMA
from mmlab.training.power_profile import WIDEST, Profile, exponent, fit, reachable
from tests.tiny_shards import make_shards, settings, sources
from tests.tiny_trainer import Keys, Kill, KillAt, run
from tests.training.test_ema import Recorder

STEPS, SNAPSHOTS = 40, 10


def posthoc(**changes: Any) -> PostHocEMA:
    return PostHocEMA(PostHocEMAConfig(**{"snapshots": SNAPSHOTS, "dtype": "float32", **changes}))


def train(root: Path, folder: Path, *callbacks: L.Callback, steps: int = STEPS) -> Recorder:
    """Resume the run in `folder`, or start it: two micro-batches a step, and a checkpoint every third step."""
    folder.mkdir(exist_ok=True)
    data = ShardDataModule(settings(train=sources(root / "a"), val=sources(root / "a")), Keys())
    stage = Recorder()
    torch.manual_seed(1)
    run(stage, data, folder, steps, callbacks, default_root_dir=folder)
    return stage


def snapshots(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "ema").iterdir()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    make_shards(root / "a", 21)
    return root


@pytest.fixture(scope="module")
def straight(root) -> tuple[Path, list[dict[str, Tensor]]]:
    """The folder of a run, and the weights that learn after each of its steps."""
    folder = root / "straight"
    stage = train(root, folder, posthoc())
    after = [{name: value.double() for name, value in stage.after[step].items()} for step in range(STEPS)]
    after.append({name: value.double() for name, value in stage.weights().items()})
    return folder, [{name: value for name, value in each.items() if "still" not in name} for each in after]


def true_average(after: list[dict[str, Tensor]], width: float, end: int = STEPS) -> dict[str, Tensor]:
    """The integral of the profile over each step, times the weights after it."""
    power = exponent(width) + 1
    shares = [((step / end) ** power - ((step - 1) / end) ** power) for step in range(1, end + 1)]
    return {name: sum(share * each[name] for share, each in zip(shares, after[1:], strict=False)) for name in after[0]}  # type: ignore[misc]


def distance(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return math.sqrt(sum(float((some[name].double() - others[name].double()).square().sum()) for name in some))


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72), (WIDEST, 0.0), (1e-3, 997)])
def test_the_exponent_of_a_width(width, gamma):
    """The pairs of 0.05 and 0.1 are in the paper."""
    found = exponent(width)
    assert found == pytest.approx(gamma, rel=1e-3, abs=2e-3)
    assert (found + 1) ** 0.5 / (found + 2) / (found + 3) ** 0.5 == pytest.approx(width, rel=1e-9)
    times = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    profile = times**found / (times**found).sum()
    mean = (profile * times).sum()
    assert float((profile * (times - mean) ** 2).sum().sqrt()) == pytest.approx(width, rel=1e-3)


def kept(snapshots: int, steps: int = 1000) -> list[Profile]:
    ends = [steps * (n + 1) // snapshots for n in range(snapshots)]
    return [Profile(end, width) for end in ends for width in (0.05, 0.1)]


def test_profiles_are_fitted():
    for count, width, most in ((20, 0.03, 0.03), (20, 0.075, 0.003), (20, 0.2, 0.02), (64, 0.015, 0.03)):
        weights, error = fit(kept(count), Profile(1000, width))
        assert sum(weights) == pytest.approx(1) and 0 < error < most
    weights, error = fit(kept(20), Profile(1000, 0.1))
    assert error < 1e-7 and weights == pytest.approx([0] * 39 + [1], abs=1e-6)
    weights, error = fit(kept(20), Profile(500, 0.05))
    assert error < 1e-7 and weights[18] == pytest.approx(1)
    low, high = reachable(kept(20), 1000)
    assert low < 0.02 and high > 0.25
    assert fit(kept(20), Profile(1000, low - 0.002))[1] > 0.1 >= fit(kept(20), Profile(1000, low))[1]
    assert reachable(kept(1), 1000)[0] > low


def test_the_averages_are_the_formulas(straight):
    folder, after = straight
    for end in (4, 20, 40):
        stored = load_file(folder / "ema" / f"step-{end}.safetensors")
        for width in (0.05, 0.1):
            average = {name: stored[f"{width}/{name}"] for name in after[0]}
            assert distance(average, true_average(after, width, end)) < 1e-6 * distance(average, after[0])
    assert sorted(snapshots(folder)) == sorted(f"step-{end}.safetensors" for end in range(4, 41, 4))


@pytest.mark.parametrize(("width", "most"), [(0.035, 0.06), (0.06, 0.01), (0.075, 0.01), (0.15, 0.02), (0.2, 0.03)])
def test_other_widths_are_made_of_the_snapshots(straight, width, most):
    """The error is a small share of what averaging changes."""
    folder, after = straight
    made, true = average_of_run(folder, width), true_average(after, width)
    assert made.describe() | {"hash": ""} == {
        **{"width": width, "exponent": exponent(width), "step": STEPS, "snapshots": SNAPSHOTS},
        **{"profile_error": made.error, "hash": ""},
    }
    changed = distance(after[-1], true)
    assert distance(made.weights, true) < most * changed


@pytest.mark.parametrize("width", [0.05, 0.1])
def test_a_width_that_is_kept_is_the_stored_average(straight, width):
    folder, _ = straight
    stored = load_file(folder / "ema" / f"step-{STEPS}.safetensors")
    made = average_of_run(folder, width)
    for name, value in made.weights.items():
        torch.testing.assert_close(value, stored[f"{width}/{name}"], rtol=1e-6, atol=1e-7)


def test_training_does_not_notice_and_both_averages_may_be_on(root, tmp_path, straight):
    folder, _ = straight
    stage = train(root, tmp_path, EMA(EMAConfig(decay=0.6)), posthoc(dtype="float16"))
    state = checkpoint_io.read(tmp_path / "checkpoints" / f"step-{STEPS}")
    for name, value in state["callbacks"]["EMA"]["average"].items():
        assert torch.equal(stage.weights()[name], value), "the one that is validated is left behind"
    alone = checkpoint_io.read(folder / "checkpoints" / f"step-{STEPS}")
    for width in ("0.05", "0.1"):
        for name, value in alone["callbacks"]["PostHocEMA"]["averages"][width].items():
            assert torch.equal(state["callbacks"]["PostHocEMA"]["averages"][width][name], value)
    half, single = average_of_run(tmp_path, 0.06).weights, average_of_run(folder, 0.06).weights
    for name, value in single.items():
        torch.testing.assert_close(half[name], value, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("cut", [("start", 2 * 8 + 1), ("train end", 0)])
def test_a_killed_run_has_the_same_snapshots(root, tmp_path, straight, cut):
    """The last checkpoint is of step 6 or the end; snapshots after it are written again."""
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt(*cut), posthoc())
    if cut[0] == "start":
        assert {"step-4.safetensors", "step-8.safetensors"} == set(snapshots(tmp_path))
        (tmp_path / "ema" / "step-8.safetensors").write_bytes(b"half")
        (tmp_path / "ema" / ".draft-1-1-step-12.safetensors").write_bytes(b"")
        (tmp_path / "ema" / "step-9.safetensors").write_bytes(b"of a trajectory that is given up")
    train(root, tmp_path, posthoc())
    assert snapshots(tmp_path) == snapshots(straight[0])


def test_a_run_that_is_extended(root, tmp_path, straight):
    shutil.copytree(straight[0], tmp_path / "longer")
    train(root, tmp_path / "longer", posthoc(), steps=STEPS + 20)
    made = average_of_run(tmp_path / "longer", 0.1)
    assert (made.step, made.snapshots) == (60, 10 + 4)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (
            0.001,
            r"ema=0.001 cannot be made from the 10 snapshot\(s\) of .* width 0.05 and 0.1; widths from 0.028 to 0.234",
        ),
        (0.3, "ema=0.3 cannot be made"),
        (0.28, "ema=0.28 cannot be made"),
    ],
)
def test_widths_that_cannot_be_made(straight, width, message):
    with pytest.raises(ConfigError, match=message):
        average_of_run(straight[0], width)


def test_snapshots_that_are_not_there_or_damaged(tmp_path, straight):
    with pytest.raises(ConfigError, match="keeps none; train it with callbacks=diffusion_posthoc"):
        average_of_run(tmp_path, 0.05)
    shutil.copytree(straight[0] / "ema", tmp_path / "ema")
    (tmp_path / "artifacts" / "eye").mkdir(parents=True)
    (tmp_path / "artifacts" / "eye" / "card.json").write_text('{"steps": 44}')
    with pytest.raises(ConfigError, match=r"to step 44, but the last snapshot of .* is of step 40; leave out ema"):
        average_of_run(tmp_path, 0.05)
    (tmp_path / "artifacts" / "eye" / "card.json").write_text('{"steps": 20}')
    made = average_of_run(tmp_path, 0.05)
    assert (made.step, made.snapshots) == (20, 5), "of an earlier end, as the artifacts"
    (tmp_path / "ema" / "step-40.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"step-40.safetensors is damaged"):
        average_of_run(tmp_path, 0.05)


@pytest.mark.parametrize("widths", [[], [0.05, 0.05], [0.3], [0.0, 0.1]])
def test_widths_that_are_refused(widths):
    with pytest.raises(ConfigError, match=r"must be different widths above 0 and below 0.2887"):
        posthoc(widths=widths)


def test_averages_begin_with_the_training(root, tmp_path):
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt("start", 13))
    with pytest.raises(RunError, match=r"has no averages, not callbacks.posthoc_ema.widths"):
        train(root, tmp_path, posthoc())
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(Kill):
        train(root, tmp_path, KillAt("start", 13), posthoc())
    with pytest.raises(RunError, match=r"has averages of widths 0.05, 0.1, not .*widths=\[0.05\]; they begin"):
        train(root, tmp_path, posthoc(widths=[0.05]))
