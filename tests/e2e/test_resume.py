"""Killed and resumed runs are bit-identical to uninterrupted ones, and the comparison finds differences."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.training.checkpoint_io import PREFIX, STATE, newest_whole, read, write
from mmlab.verbs.resume_check import compare

MATRIX = Path(__file__).parents[2] / "experiments" / "kill_matrix" / "kill_matrix.py"
TINY = [
    "experiment=llava/language_tiny",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.workers=1",
    "data.max_length=128",
    "data.val=[]",
    "trainer=cpu",
    "callbacks.samples=null",
    "model.language.architecture.num_hidden_layers=1",
    "+model.language.architecture.attention_dropout=0.1",
]


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> tuple[Path, str]:
    """Two runs that `mmlab resume-check` has compared, and its output."""
    folder = tmp_path_factory.mktemp("proof")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["shards", "build", "shapes", "data/shapes/train", "--count", "24"]) == 0
        assert cli.main(["shards", "tokenizer", "data/shapes/train", "--out", "data/shapes/tokenizer"]) == 0
        command = [sys.executable, "-m", "mmlab.cli", "resume-check", *TINY]
        options = ["--steps", "7", "--every", "3", "--kill-at", "5", "--out", "proof"]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "proof", done.stdout


def test_a_killed_run_is_identical(proof):
    assert proof[1].splitlines()[-1] == "identical: 7 steps, killed at 5"
    lines = (proof[0] / "killed" / "batches-0.jsonl").read_text().splitlines()
    assert len(lines) > 14, "the step after the checkpoint was trained twice"


def test_a_difference_is_named(proof, tmp_path):
    straight, killed = proof[0] / "straight", proof[0] / "killed"
    assert compare(straight, killed) is None
    newest = newest_whole(killed / "checkpoints", pytest.fail)
    assert newest is not None
    other = tmp_path / "checkpoints" / f"{PREFIX}7"
    other.mkdir(parents=True)
    log = killed / "batches-0.jsonl"
    (tmp_path / log.name).write_bytes(log.read_bytes())
    state = read(newest)
    name = next(iter(state["state_dict"]))
    state["state_dict"][name].view(-1)[0] += 1e-3
    write(state, other)
    difference = compare(straight, tmp_path)
    assert difference is not None and f"state_dict.{name}: 1 of " in difference
    (other / STATE).unlink()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[-1]["keys"] = lines[-1]["keys"][::-1][:1]
    (tmp_path / log.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    difference = compare(straight, tmp_path)
    assert difference is not None and difference.startswith("step 7 was trained on")


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        ([(1, "a"), (2, "b")], "step 3 was trained on ['c'] and on None"),
        ([(1, "a"), (2, "b"), (3, "c"), (4, "d")], "step 4 was trained on None and on ['d']"),
        ([(1, "a"), (2, "b"), (2, "x"), (3, "c")], "step 2 was trained on ['b'], and after a resume on ['x']"),
        ([(1, "a"), (2, "b"), (2, "b"), (3, "c")], "straight has no checkpoint"),
    ],
)
def test_differing_steps_are_named(tmp_path, killed, message):
    for name, steps in (("straight", [(1, "a"), (2, "b"), (3, "c")]), ("killed", killed)):
        lines = [json.dumps({"step": step, "micro": 0, "keys": [key]}) for step, key in steps]
        (tmp_path / name).mkdir()
        (tmp_path / name / "batches-0.jsonl").write_text("\n".join(lines))
    difference = compare(tmp_path / "straight", tmp_path / "killed")
    assert difference is not None and difference.endswith(message)


def test_a_run_that_cannot_start_reports_its_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["resume-check", "experiment=llava/language_tny"]) == 2
    assert "language_tiny" in capsys.readouterr().err
    assert cli.main(["resume-check", *TINY, "--kill-at", "99"]) == 2


def test_a_short_kill_matrix(tmp_path):
    """experiments/kill_matrix/run.sh is the long version with 200 kills."""
    done = subprocess.run([sys.executable, str(MATRIX), str(tmp_path / "out"), "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] > 0 and figures["same_batches"] and figures["difference"] is None
