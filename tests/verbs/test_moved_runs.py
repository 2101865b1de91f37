"""Every verb that takes a run takes a moved one, by absolute path, from any working folder."""

import shutil
from pathlib import Path

import pytest

from mmlab import cli
from tests.evaluate.tiny_scores import contrastive_run, diffusion_run, first_stage_run, make_noise
from tests.verbs.tiny_prior_runs import prior_run, vq_run

CPU = "trainer.accelerator=cpu"


@pytest.fixture(scope="module")
def moved(tmp_path_factory, tokenizer_folder) -> Path:
    """Runs whose tokenizers and earlier runs are relative to a folder that is gone."""
    root = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        runs, tokenizer = Path("runs"), Path(shutil.copytree(tokenizer_folder, "tokenizer"))
        contrastive_run(runs, tokenizer)
        first_stage_run(runs)
        diffusion_run(runs, "text", ["model/conditioner=text_tiny", f"model.conditioner.tokenizer={tokenizer}"])
        vq_run(runs)
        prior_run(runs, "prior")
    there = tmp_path_factory.mktemp("moved")
    make_noise(there / "val", 12, 1)
    return (root / "runs").rename(there / "elsewhere")


@pytest.mark.parametrize(
    "command",
    [
        "sample run={runs}/text prompt=red steps=2 out=out",
        "sample run={runs}/prior label=circle count=1 out=out",
        "export run={runs}/prior out=out",
        "export run={runs}/first_stage out=out",
        "eval run={runs}/first_stage data.path={runs}/../val features={runs}/eye out=out",
        "shards encode {runs}/text {runs}/../val out",
        "shards encode {runs}/prior {runs}/../val out",
    ],
)
def test_a_moved_run(moved, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    words = command.format(runs=moved).split()
    code = cli.main([*words, *([CPU] if words[0] in ("sample", "eval") else [])])
    assert code == 0, capsys.readouterr().err
    assert any(Path("out").iterdir())
