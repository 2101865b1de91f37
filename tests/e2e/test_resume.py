"""Killed and resumed runs are bit-identical to uninterrupted ones, and the comparison finds differences."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.training.checkpoint_folder import PREFIX, STATE, newest_whole
from mmlab.training.checkpoint_io import read, write
from mmlab.verbs.resume_check import check, compare
from tests.tiny_commands import carry_out

MATRIX = Path(__file__).parents[2] / "experiments" / "kill_matrix" / "kill_matrix.py"
SIZE = "{hidden_size:32,intermediate_size:64,num_hidden_layers:1,num_attention_heads:2}"
TINY = [
    "experiment=llava/language_tiny",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.workers=1",
    "data.max_length=128",
    "data.val=[{path:train,name:val}]",
    "trainer=cpu",
    "callbacks.samples=null",
    f"model.language.architecture={SIZE}",
]
# An adapter on 4-bit weights, with all that a step may have; the kill matrix trains all weights.
ADAPTED = [
    "stage.init_from=[tongue]",
    "model.language.quantize=nf4",
    "+stage.lora.language.rank=4",
    "+stage.lora.language.dropout=0.2",
    "data.pack=true",
    "+callbacks.ema._target_=mmlab.training.ema.EMA",
    "trainer.gradient_checkpointing=true",
    "trainer.gradient_clip_val=1",
]


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> tuple[Path, str]:
    """Two runs that `mmlab resume-check` has compared, and its output."""
    folder = tmp_path_factory.mktemp("proof")
    carry_out(
        folder,
        [
            "shards build shapes data/shapes/train --count 24",
            "shards tokenizer data/shapes/train --out data/shapes/tokenizer",
            f"train {' '.join(TINY)} trainer.max_steps=1 run.name=tongue",
        ],
    )
    command = [sys.executable, "-m", "mmlab.cli", "resume-check", *TINY, *ADAPTED]
    # At 7, the last validation is interrupted.
    options = ["--steps", "7", "--every", "3", "--val-every", "2", "--kill-at", "5", "7v", "--out", "proof"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "proof", done.stdout


def test_a_killed_run_is_identical(proof):
    assert proof[1].splitlines()[-1] == "identical: 7 steps, killed at 5, 7v"
    lines = (proof[0] / "killed" / "batches-0.jsonl").read_text().splitlines()
    assert len(lines) > 14, "the step after the checkpoint was trained twice"


def test_a_killed_run_on_shards_without_an_index_is_identical(proof, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(proof[0].parent)
    bare = Path("data", "shapes", "bare")
    bare.mkdir()
    for n in range(2):
        shutil.copy(next(Path("data", "shapes", "train").glob("*.tar")), bare / f"{n}.tar")
    stream = ["data/loader=stream", "data.train=[{path: 'bare/{0..1}.tar'}]", "data.val=[{path: bare, name: val}]"]
    overrides = [*TINY, *stream, "data.loader.shuffle=8", "callbacks.picture_use=null"]
    kills, difference = check(overrides, tmp_path / "proof", 15, every=4, val_every=15, kills=["11"])
    assert (kills, difference) == (["11"], None)
    log = (tmp_path / "proof" / "killed" / "output.log").read_text()
    assert log.count("data/loader=stream: the order of samples depends on the numbers of ranks and workers") == 2


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
    ("file", "before", "after", "names"),
    [
        ("metrics.csv", "\n6,", "\n6,1", "metrics.csv.6."),
        ("data_report.json", '"seen": 24', '"seen": 8', "data_report.json.validation.seen: 24 and 8"),
        ("done.json", '"steps": 7', '"steps": 6', "done.json.steps: 7 and 6"),
    ],
)
def test_a_differing_result_is_named(proof, tmp_path, file, before, after, names):
    straight, other = proof[0] / "straight", tmp_path / "other"
    shutil.copytree(proof[0] / "killed", other)
    text = (other / file).read_text()
    assert before in text
    (other / file).write_text(text.replace(before, after))
    assert names in (compare(straight, other) or "")
    (other / file).unlink()
    assert file in (compare(straight, other) or "")


def test_an_end_that_has_passed_is_refused_before_anything_is_written(proof, monkeypatch, capsys):
    monkeypatch.chdir(proof[0].parent)
    run = Path("proof", "straight")
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    assert cli.main(["train", *TINY, *ADAPTED, f"run.dir={run}", "trainer.max_steps=5"]) == 2
    assert "was trained for 7 steps and cannot end after 5" in capsys.readouterr().err
    assert [path.read_bytes() for path in files] == before and not list(run.rglob("step-5*"))


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
    for kill, says in (("99", "between 1 and --steps=12"), ("-v", "such as 3 or 8v"), ("7v", "no validation follows")):
        assert cli.main(["resume-check", *TINY, f"--kill-at={kill}"]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("kills", ["2", "4 fsdp:2"])
def test_a_short_kill_matrix(tmp_path, kills):
    """experiments/kill_matrix/run.sh is the long version; on two ranks one is killed, or all, also in a save."""
    command = [sys.executable, str(MATRIX), str(tmp_path / "out"), *kills.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] > 0 and figures["same_batches"] and figures["difference"] is None
