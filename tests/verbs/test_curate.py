"""`mmlab curate`, as a user types it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmlab import cli
from mmlab.curate.decisions import Review
from mmlab.curate.journal import step_rows
from mmlab.data.index import ShardIndex
from tests.curate.scripted_endpoint import ScriptedEndpoint
from tests.curate.tiny_curation import decide, waiting
from tests.evaluate.tiny_scores import make_run
from tests.model import tiny
from tests.tiny_shapes import make_shapes

TINY = "hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with images and a run that says something about them, if nothing sensible."""
    root = make_shapes(tmp_path_factory.mktemp("work"), train=5)
    tokenizer = root / "tokenizer"
    small = ["model/vision=siglip_tiny", f"model.vision.architecture={{{TINY}, image_size: 16, patch_size: 8}}"]
    small += [f"model.language.architecture={{model_type: llama, {TINY}}}", f"model.language.tokenizer={tokenizer}"]
    overrides = ["experiment=llava/finetune_tiny", "stage.init_from=[]", f"data.root={root}", *small]
    make_run(root / "runs", "describer", overrides, ["vision", "connector", "language"])
    tiny.language(tokenizer).save(root / "helper")
    return root


def curate(work, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    code = cli.main(["curate", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def minigpt4(*changes: str) -> tuple[str, ...]:
    few = ("max_new_tokens=6", "trainer.accelerator=cpu", "rules=[empty]")
    return ("minigpt4", "run=describer", "data.path=train", *few, *changes)


def test_from_images_to_shards(work, monkeypatch, capsys):
    with ScriptedEndpoint(answer=lambda prompt: f"A tiny scene, number {len(prompt) % 7}.") as server:
        argv = minigpt4("out=curated", f"llm.url={server.url}", "llm.model=gpt-tiny", "llm.prompt_price=2")
        code, out, err = curate(work, monkeypatch, capsys, *argv)
        assert code == 0, err
        assert "described   5 images" in out and "5 to review: mmlab curate review out=curated" in out
        assert server.headers[0]["Authorization"] == "Bearer sk-very-secret"
        review = Review(work / "curated")
        for i in range(5):
            decide(review, i, "reject" if i == 2 else "accept")
        asked = len(server.asked)
        code, out, err = curate(work, monkeypatch, capsys, *argv)
        assert code == 0 and "written     4 samples" in out and "shards: curated/shards" in out, err
        assert len(server.asked) == asked
    for path in (work / "curated").rglob("*"):
        assert path.is_dir() or b"sk-very-secret" not in path.read_bytes(), path
    shards = ShardIndex.open(work / "curated" / "shards")
    record = json.loads(shards.read(0)["json"])
    assert record["caption"].startswith("A tiny scene") and record["provenance"]["review"] == "accept"
    prompt = step_rows(work / "curated", "continued")
    assert all(row["continued"] for row in prompt), "6 tokens and 6 more"


def test_a_local_model_repairs_without_a_review(work, monkeypatch, capsys):
    local = ("llm=local", "llm.source=helper", "llm.template=v1", "llm.max_tokens=5", "unrepaired=keep", "rules=[]")
    code, out, err = curate(work, monkeypatch, capsys, *minigpt4("out=local", "review=none", "samples=3", *local))
    assert code == 0 and "written     3 samples" in out, err
    kept = [path.read_text() for path in (work / "local" / "replies").rglob("*.json")]
    assert kept and all(json.loads(text)["model"] == "helper" for text in kept)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["minigtp4"],
            "There is no command 'minigtp4' of curate. Did you mean 'minigpt4'? Commands: minigpt4, llava_instruct, "
            "review.",
        ),
        (minigpt4("out=x"), "'llm.model' has no value; give llm.model=…"),
        (minigpt4("out=x", "llm.model=m", "rules=[repeat]"), "There is no rule 'repeat'. Did you mean 'repeats'?"),
        (minigpt4("out=x", "llm.model=m", "llm.url=http://box/v1"), "would be sent unencrypted to box"),
        (minigpt4("out=x", "llm.model=m", "llm.modle=m"), "There is no key 'llm.modle'. Did you mean 'model'?"),
        (minigpt4("out=x", "llm=openai"), "Config group 'llm' has no option 'openai'."),
        (minigpt4("out=x", "llm.model=m", "run=describe"), "Did you mean 'describer'?"),
        (minigpt4("out=x", "llm.model=m", "template=plain"), "such as template=v1."),
        (["review", "out=train"], "There is no curation in train"),
        (["review", "out=train/index/manifest.json"], "There is no curation in train/index/manifest.json"),
        (["review"], "'out' has no value"),
        (["review", "out=x", "prt=1"], "There is no key or config group 'prt'. Did you mean 'port'?"),
    ],
)
def test_mistakes_are_one_sentence(work, monkeypatch, capsys, argv, message):
    code, _, err = curate(work, monkeypatch, capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (work / "x").exists()


def test_a_key_that_is_not_set_is_noticed_before_anything_is_described(work, monkeypatch, capsys):
    code, _, err = curate(work, monkeypatch, capsys, *minigpt4("out=x", "llm.model=m", "llm.variable=NO_SUCH_KEY"))
    assert code == 2 and err.endswith("NO_SUCH_KEY is not set; set it, or use llm.variable=null.\n")
    assert not (work / "x").exists()


@pytest.mark.parametrize("argv", [[], ["--help"], ["minigpt4", "--help"], ["review", "--help"]])
def test_help(work, monkeypatch, capsys, argv):
    code, out, _ = curate(work, monkeypatch, capsys, *argv)
    assert code == 0 and out.startswith(f"mmlab curate {argv[0] if len(argv) > 1 else '<command>'} [")


def test_the_review_is_served_until_ctrl_c(tmp_path):
    """Even from a script that runs it in the background, where a shell has Ctrl-C ignored."""
    out = waiting(tmp_path, [("a dog.", "A dog."), ("a cat.", "A cat."), ("a cow.", "A cow.")])
    decide(Review(out), 1, "reject")
    command = [sys.executable, "-m", "mmlab.cli", "curate", "review", "out=out", "port=0"]
    here = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    background = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command]
    with subprocess.Popen(background, cwd=tmp_path, env=here, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            assert "3 descriptions to review: http://127.0.0.1:" in served.stdout.readline()
            served.send_signal(signal.SIGINT)
            assert served.wait(30) == 0
            assert served.stdout.read() == "accepted 0, edited 0, rejected 1, left 2\n"
        finally:
            served.kill()
