"""Two ranks that share a model compute what one process does, or what two with a model each do."""

import faulthandler
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stage.tiny_codes import make_maps
from tests.stage.tiny_several import make_several
from tests.tiny_ranks import ranks
from tests.tiny_shapes import make_shapes
from tests.training import sharded_cases
from tests.training.sharded_cases import CASES, KINDS

RANKS = 2
BY_RANK = ("qformer_pretraining", "kl", "vq", "vq_ema")
"""Kinds whose negatives, revived codes or batch norms depend on the number of ranks."""
EXACT = [name for name, case in CASES.items() if case.precision == "32-true"]
ALONE = [name for name in EXACT if CASES[name].kind not in BY_RANK and not CASES[name].chunked]
"""Cases that are compared with one process, which logs the loss of its last micro-batch only. The others, and that with
the chunked loss, are compared with a model on each rank."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with what each strategy computed, see `sharded_cases.run`."""
    root = make_shapes(tmp_path_factory.mktemp("sharding"))
    make_maps(root, 8, "maps")
    make_several(root / "several")
    ranks(RANKS, _strategies, root, meanwhile=partial(_alone, root))
    return root


def _alone(root: Path) -> None:
    for name in ALONE:
        torch.save(sharded_cases.run(CASES[name], root, "auto", 1), root / f"{name}-auto-0.pt")


def _strategies(rank: int, root: Path) -> None:
    faulthandler.dump_traceback_later(900, exit=True)  # later than other ranks: these have more to do
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no processes
    for name, case in CASES.items():
        for strategy in ("fsdp",) if name in ALONE else ("ddp", "fsdp"):
            torch.save(sharded_cases.run(case, root, strategy, RANKS), root / f"{name}-{strategy}-{rank}.pt")
    (root / f"poisoned-{rank}.txt").write_text(sharded_cases.poisoned(root))


def load(root: Path, name: str, strategy: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / f"{name}-{strategy}-{rank}.pt", weights_only=True)


def difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest of all tensors, relative to the largest number in each, and to a tenth of that in all of them."""
    assert actual.keys() == expected.keys()
    sizes = {name: float(tensor.double().abs().max()) for name, tensor in expected.items() if tensor.numel()}
    least = max(0.1 * max(sizes.values(), default=0.0), 1e-12)
    gaps = {name: float((actual[name].double() - expected[name].double()).abs().max()) for name in sizes}
    return max((gap / max(sizes[name], least) for name, gap in gaps.items()), default=0.0)


@pytest.mark.parametrize("name", EXACT)
def test_equals_the_unsharded_computation(results, name):
    sharded, whole = load(results, name, "fsdp"), load(results, name, "auto" if name in ALONE else "ddp")
    # Before the discriminator starts, its gradients are 0 or there are none.
    gradients = {key: whole["gradients"][key] for key in sharded["gradients"]}
    assert not any(gradient.any() for key, gradient in whole["gradients"].items() if key not in gradients)
    assert difference(sharded["gradients"], gradients) < 1e-5
    assert sharded["norms"] == pytest.approx(whole["norms"], rel=1e-4)
    assert difference(sharded["weights"], whole["weights"]) < 1e-4
    assert difference(sharded["buffers"], whole["buffers"]) < 1e-4
    if name not in ALONE:
        assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_bf16_is_close_to_the_unsharded_computation(results, name):
    """Weights that autocast leaves in fp32 are gathered in bf16, with 8 bits, that is 0.4 %: ten such errors are
    allowed. Stochastic rounding draws other numbers on each rank."""
    sharded, whole = load(results, name, "fsdp"), load(results, name, "ddp")
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=0.04)
    first = [torch.cat([value.flatten().double() for value in done["gradients"].values()]) for done in (sharded, whole)]
    assert (first[0] - first[1]).norm() < 0.04 * first[1].norm()
    if CASES[name].kind == "vq":  # first stages are gathered in fp32
        assert difference(sharded["weights"], whole["weights"]) < 1e-5
    dtypes = [{key: value.dtype for key, value in done["weights"].items()} for done in (sharded, whole)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree(results, name):
    first, second = load(results, name, "fsdp"), load(results, name, "fsdp", 1)
    for key in ("weights", "buffers"):
        assert difference(second[key], first[key]) == 0
    assert first["norms"] == second["norms"]


def test_what_is_sharded(results):
    for name, case in CASES.items():
        done = load(results, name, "fsdp")
        plain = done["weights"].keys() - set(done["sharded"])
        if case.whole_below:
            assert plain == {key for key in done["weights"] if not key.startswith("connector.")}
        elif case.kind == "odd":
            assert plain == {"scale", "first.shared"}
        else:
            assert all(done["weights"][key].dim() == 0 for key in plain), name


def test_all_ranks_end_alike(results):
    """One rank's share has a NaN, of which the other one learns in time."""
    said = [(results / f"poisoned-{rank}.txt").read_text() for rank in range(RANKS)]
    assert said[0].startswith("The weights of connector have NaN or infinity at step 2:")
    assert said[0] == said[1]


def test_every_kind_is_tried():
    assert {case.kind for case in CASES.values()} == set(KINDS)
