"""`mmlab eval` of first stages and diffusion models, as a user types it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmlab import cli
from mmlab.training.ema_snapshots import average_of_run
from mmlab.verbs._generators import restore_with
from mmlab.verbs._scorings import SCORINGS
from tests.evaluate.tiny_scores import contrastive_run, diffusion_run, first_stage_run, make_noise
from tests.model import tiny
from tests.verbs.test_shards_encode import latents_of


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with an eye, a first stage, a denoiser, and held-out and training pictures."""
    root = tmp_path_factory.mktemp("work")
    contrastive_run(root / "runs", tokenizer_folder)
    first_stage_run(root / "runs")
    diffusion_run(root / "runs")
    make_noise(root / "val", 12, 1)
    make_noise(root / "train", 80, 2)
    return root


def evaluate(work, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main(["eval", *argv, "data.path=val", "trainer.accelerator=cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_first_stage(work, monkeypatch, capsys):
    code, out, err = evaluate(
        work, monkeypatch, capsys, "run=first_stage", "data.train_from=train", "features=eye", "batch_size=5"
    )
    assert code == 0, err
    folder = work / "runs" / "first_stage" / "eval" / "val"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["run"] == "first_stage" and scores["pictures"]["pictures"] == 12
    assert 0 < scores["psnr"] < 40 and -1 < scores["ssim"] <= 1 and scores["perceptual"] > 0
    assert "not LPIPS" in scores["perceptual_distance"]
    assert scores["linear_values"] == 64 and scores["linear_psnr"] > scores["psnr"], "untrained, it loses to a line"
    assert scores["rfid"] > 0 and scores["features"]["width"] == 32
    assert f"{'psnr':<28}" in out and "stand-in: no published FID" in out and "biased" in out
    assert Image.open(folder / "reconstructions.png").width > 500


def test_a_linear_code_that_does_not_fit_costs_no_other_score(work, monkeypatch, capsys):
    monkeypatch.setattr("mmlab.evaluate.pictures.reconstructions.LINEAR_BYTES", 4 * 3 * 8**2)
    code, out, err = evaluate(work, monkeypatch, capsys, "run=first_stage", "data.train_from=train", "out=unlined")
    assert code == 0, err
    scores = json.loads((work / "unlined" / "scores.json").read_text())
    assert scores["psnr"] > 0 and "needs more than 64 images" in scores["linear_left_out"]
    assert f"no linear baseline: {scores['linear_left_out']}" in out


def test_a_diffusion_model(work, monkeypatch, capsys):
    asked = ["run=denoiser", "data.train_from=train", "features=eye", "samples=14", "batch_size=6", "out=here"]
    code, out, err = evaluate(work, monkeypatch, capsys, *asked)
    assert code == 0, err
    scores = json.loads((work / "here" / "scores.json").read_text())
    assert scores["samples"] == 14 and scores["sampler"] == "ddim" and scores["steps"] == 2
    assert scores["fid"] > 0 and scores["noise_fid"] > 0 and scores["train_fid"] > 0
    assert 0 <= scores["neighbours"]["close"] <= 1 and "neighbours close" in out
    assert {path.name for path in (work / "here").glob("*.png")} == {"samples.png", "neighbours.png"}
    again = [*asked[:-1], "out=again"]
    assert evaluate(work, monkeypatch, capsys, *again)[0] == 0
    assert (work / "again" / "scores.json").read_bytes() == (work / "here" / "scores.json").read_bytes()
    other = [*asked[:-1], "out=other", "sampler=euler", "sampler.steps=3", "sampler.guidance.scale=2", "seed=5"]
    assert evaluate(work, monkeypatch, capsys, *other)[0] == 0
    changed = json.loads((work / "other" / "scores.json").read_text())
    assert (changed["sampler"], changed["steps"], changed["guidance"], changed["seed"]) == ("euler", 3, 2, 5)
    assert changed["fid"] != scores["fid"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    """A tiny DINOv2 with random weights, as transformers saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "dino"
    tiny.vision("dinov2", feature_layer=-1).tower.save_pretrained(folder)
    return folder


def test_distances_in_the_features_of_several_networks(work, dino, monkeypatch, capsys):
    asked = ["run=denoiser", "data.train_from=train", "samples=14", "batch_size=6"]
    code, out, err = evaluate(work, monkeypatch, capsys, *asked, f"features=[eye,{dino}]", "out=both")
    assert code == 0, err
    scores = json.loads((work / "both" / "scores.json").read_text())
    assert evaluate(work, monkeypatch, capsys, *asked, f"features={dino}", "out=one")[0] == 0
    alone = json.loads((work / "one" / "scores.json").read_text())
    (other,) = scores["others"]
    assert other["features"]["network"].startswith("dinov2") and f"in the features of: dinov2 of {dino}" in out
    for name in ("fid", "kid", "precision", "recall", "fid_infinity", "fid_bias", "train_fid", "train_recall"):
        assert alone[name] == pytest.approx(other[name], rel=1e-6), name
    assert other["fid"] != pytest.approx(scores["fid"]) and 0 <= scores["precision"] <= 1
    assert evaluate(work, monkeypatch, capsys, "run=first_stage", f"features=[eye,{dino}]", "out=rfids")[0] == 0
    scores = json.loads((work / "rfids" / "scores.json").read_text())
    assert scores["rfid"] > 0 and scores["others"][0]["rfid"] > 0
    for wrong in ("[eye,eye]", "[]", "''", "5"):
        code, _, err = evaluate(work, monkeypatch, capsys, *asked, f"features={wrong}")
        assert code == 2 and "must be the name of a network, or a list of different ones" in err


def test_scores_are_repeated_from_their_file(work, monkeypatch, capsys):
    asked = ["run=denoiser", "data.train_from=train", "features=eye", "samples=9", "batch_size=4", "out=first"]
    drawn = ["sampler=ddim", "sampler.eta=0.5", "steps=3", "guidance=2", "seed=11", "limit=10"]
    assert evaluate(work, monkeypatch, capsys, *asked, *drawn)[0] == 0
    file = work / "first" / "scores.json"
    first = json.loads(file.read_text())
    assert first["sampler_settings"]["eta"] == 0.5 and first["sampler_settings"]["guidance"]["scale"] == 2
    assert first["ema"] is None and first["inputs"]["run"].keys() >= {"denoiser", "conditioner", "first_stage"}
    assert first["inputs"]["data.path"].startswith(first["pictures"]["index"])

    def repeat(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["eval", "scores=first/scores.json", *argv])
        return code, *capsys.readouterr()

    code, out, err = repeat()
    assert code == 0, err
    assert (
        out.splitlines()[-1].endswith("numbers equal those of first/scores.json") and "not" not in out.splitlines()[-1]
    )
    again = json.loads((work / "first" / "repeated" / "scores.json").read_text())
    assert again == first
    code, out, _ = repeat("seed=12", "out=other", "guidance=1")
    assert code == 0 and out.splitlines()[-1].startswith("not repeated: ")
    assert "fid " in out.splitlines()[-1] and out.splitlines()[-1].endswith(
        "changed: guidance=1.0, not 2.0, seed=12, not 11"
    )
    code, out, _ = repeat("sampler=euler", "out=euler")
    assert code == 0 and "sampler.name=euler, not ddim" in out and "_target_" not in out.splitlines()[-1]
    # A set under another name is the same set.
    (work / "moved").symlink_to(work / "val")
    code, out, _ = repeat("data.path=moved", "out=moved_scores")
    assert code == 0 and out.splitlines()[-1].endswith("scores.json; changed: data.path=moved, not val")


def test_other_inputs_are_named_before_anything_is_drawn(work, monkeypatch, capsys):
    asked = ["run=denoiser", "features=eye", "samples=9", "out=before"]
    assert evaluate(work, monkeypatch, capsys, *asked)[0] == 0
    first = json.loads((work / "before" / "scores.json").read_text())

    run = first["inputs"]["run"] | {"denoiser": "0" * 64, "gone": "1" * 64}
    record = first | {"inputs": {"run": run, "data.path": "123456789", "features": "2" * 64}}
    (work / "before" / "scores.json").write_text(json.dumps(record))
    monkeypatch.setattr("mmlab.verbs._picture_scorings.score_samples", lambda *_: pytest.fail("it draws"))
    assert cli.main(["eval", "scores=before/scores.json"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be repeated" in err
    assert f"data.path=val has hash {first['inputs']['data.path'][:8]}, not 12345678" in err
    assert "features=eye has hash" in err and "run=denoiser (denoiser) has hash" in err
    assert "run=denoiser (gone) is missing, not 11111111" in err and "first_stage" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "scores=repeat.json cannot be read: No such file"),
        ("{", "scores=repeat.json cannot be read: it is not JSON"),
        ('{"fid": 1}', "does not hold the settings of its scores"),
        ('{"settings": {"run": "${oc.env:HOME}"}, "inputs": {}, "machine": {}}', "contains an interpolation"),
        (
            '{"settings": {"run": "gone", "data": {"path": "val"}}, "inputs": {}, "machine": {}}',
            "There is no run 'gone'",
        ),
        ('{"settings": {"run": "denoiser", "stepps": 3}, "inputs": {}, "machine": {}}', "stepps"),
        ('{"settings": {"run": "a", "steps": "x"}, "inputs": {}, "machine": {}}', "its setting steps cannot be used: "),
        ('{"settings": {"data": {"pth": "x"}}, "inputs": {}, "machine": {}}', "pth"),
        ('{"settings": {"data": "x"}, "inputs": {}, "machine": {}}', "data"),
    ],
)
def test_files_without_scores_are_one_sentence(work, monkeypatch, capsys, content, message):
    monkeypatch.chdir(work)
    if content is None:
        (work / "repeat.json").unlink(missing_ok=True)
    else:
        (work / "repeat.json").write_text(content)
    assert cli.main(["eval", "scores=repeat.json"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run=denoiser", "features=eye", "classes=[a,b]"], "classes applies only to models that compare images"),
        (["run=denoiser"], "set features to a run of stage=contrastive"),
        (["run=denoiser", "features=ey"], "Did you mean 'eye'?"),
        (["run=denoiser", "features=eye", "sampler=dimm"], "Did you mean 'ddim'?"),
        (["run=first_stage", "features=first_stage"], "has no vision encoder"),
        (["run=first_stage", "data.train_from=val"], "needs more than 64 training images; there are 12"),
    ],
)
def test_mistakes_are_one_sentence(work, monkeypatch, capsys, argv, message):
    code, _, err = evaluate(work, monkeypatch, capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1


def test_pictures_are_needed_and_not_their_latents(work, monkeypatch, capsys):
    latents_of(work, "first_stage", "val", "cached")
    monkeypatch.chdir(work)
    assert cli.main(["eval", "run=first_stage", "data.path=cached", "trainer.accelerator=cpu"]) == 1
    assert "scores need the images, not their latents" in capsys.readouterr().err


PIXELS = [
    *("train", "model=diffusion", "model/conditioner=class", "model/denoiser=dit_tiny", "data=emoji", "data.root=."),
    *("stage=latent_diffusion", "stage.trainable=[denoiser, conditioner]", "process=cosine_v", "sampler=euler"),
    *("sampler.steps=2", "callbacks=diffusion_scored", "callbacks.ema.decay=0.5", "model.conditioner.width=8"),
    *("model.denoiser={depth: 1, width: 16, heads: 2}", "model.conditioner.classes=[circle, square, star]"),
    *("data.size=8", "data.global_batch=8", "data.micro_batch=8", "data.workers=0", "trainer=cpu", "logger=none"),
    *("trainer.max_steps=4", "trainer.val_every=2", "callbacks.sample_quality.pictures=val"),
    *("callbacks.sample_quality.samples=14", "callbacks.sample_quality.batch_size=6"),
]


def test_a_run_knows_the_score_of_its_average(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    assert cli.main([*PIXELS, "run.name=scored", "callbacks.sample_quality.features=eye"]) == 0
    done = json.loads((work / "runs" / "scored" / "done.json").read_text())
    capsys.readouterr()
    code, _, err = evaluate(work, monkeypatch, capsys, "run=scored", "features=eye", "samples=14", "out=scored")
    assert code == 0, err
    scores = json.loads((work / "scored" / "scores.json").read_text())
    assert done["val/fid"] == pytest.approx(scores["fid"], rel=1e-4)
    assert done["val/kid"] == pytest.approx(scores["kid"], rel=1e-4, abs=1e-4)


def test_each_point_of_a_sweep_has_its_own_folder(work, monkeypatch, capsys):
    def score(cfg, folder, trained, out):
        out.mkdir(parents=True)
        (out / "scores.json").write_text(json.dumps({"fid": cfg.guidance}))

    monkeypatch.setitem(SCORINGS, "draws", score)
    code, _, err = evaluate(work, monkeypatch, capsys, "-m", "run=denoiser", "guidance=1,2", "sampler=ddim,euler")
    assert code == 0, err
    folders = (work / "runs" / "denoiser" / "eval").glob("val-*")
    assert sorted(folder.name for folder in folders) == [
        f"val-guidance{scale}-sampler{sampler}" for scale in (1, 2) for sampler in ("ddim", "euler")
    ]
    evaluate(work, monkeypatch, capsys, "-m", "guidance=1", "out=scores", "run=denoiser,./runs/denoiser")
    assert len(list(work.glob("scores-run*/scores.json"))) == 2


def test_averages_of_a_width_that_is_chosen_after_training(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    own = [*(word for word in PIXELS if not word.startswith(("callbacks", "trainer.max", "trainer.val")))]
    keeps = ["callbacks=diffusion_posthoc", "callbacks.samples=null", "callbacks.posthoc_ema.dtype=float32"]
    keeps += ["model/uncertainty=edm2"]  # of which samples need nothing
    assert cli.main([*own, *keeps, "run.name=averaged", "trainer.max_steps=12", "optim.lr=0.1"]) == 0
    assert "runs/averaged/ema: 12 snapshots of averages, 0.961 MiB in all" in capsys.readouterr().out
    asked = ["run=averaged", "features=eye", "samples=9"]
    code, out, err = evaluate(work, monkeypatch, capsys, "-m", *asked, "ema=0.07,0.1")
    assert code == 0, err
    folders = [work / "runs" / "averaged" / "eval" / f"val-ema{width}" for width in ("0.07", "0.1")]
    first, second = (json.loads((folder / "scores.json").read_text()) for folder in folders)
    assert first["settings"]["ema"] == first["ema"]["width"] == 0.07 and first["ema"]["step"] == 12
    assert first["fid"] != second["fid"] and first["inputs"]["ema"] == first["ema"]["hash"] != second["ema"]["hash"]
    table = (work / "runs" / "sweeps" / "eval-averaged-val-ema" / "table.csv").read_text().splitlines()
    assert table[0].startswith("ema,run,status,steps,fid,kid") and len(table) == 3
    assert {line.split(",")[0]: float(line.split(",")[4]) for line in table[1:]} == {
        "0.07": first["fid"],
        "0.1": second["fid"],
    }
    best = min((first, second), key=lambda scores: scores["fid"])["ema"]["width"]
    printed = out[out.index("ema ") :].splitlines()
    assert printed[1].startswith(f"{best:g} "), "the smallest FID is first"
    assert "sweeps/eval-averaged-val-ema/table.png" in out

    stored = load_file(work / "runs" / "averaged" / "ema" / "step-12.safetensors")
    model = restore_with(average_of_run(Path("runs/averaged"), 0.1), Path("runs/averaged"))
    for name, weight in model.denoiser.named_parameters():
        torch.testing.assert_close(weight, stored[f"0.1/denoiser.{name}"], rtol=1e-5, atol=1e-7)
    assert cli.main(["export", "run=averaged", "ema=0.1", "sampler=ddim", "out=exported"]) == 0
    exported = load_file(work / "exported" / "denoiser" / "diffusion_pytorch_model.safetensors")
    own_weights = {tuple(weight.shape): weight for weight in model.denoiser.parameters()}
    assert any(torch.equal(value, own_weights[tuple(value.shape)]) for value in exported.values() if value.dim() == 2)
    assert cli.main(["sample", "run=averaged", "label=circle", "count=1", "strip=0", "out=drawn", "ema=0.1"]) == 0
    assert json.loads((work / "drawn" / "samples.json").read_text())["ema"] == 0.1

    capsys.readouterr()
    file = folders[0] / "scores.json"
    assert cli.main(["eval", f"scores={file}"]) == 0
    assert "numbers equal those of" in capsys.readouterr().out
    (work / "runs" / "averaged" / "ema" / "step-11.safetensors").unlink()
    assert cli.main(["eval", f"scores={file}"]) == 1
    assert "ema=0.07 has hash" in capsys.readouterr().err
    code, _, err = evaluate(work, monkeypatch, capsys, *asked, "ema=0.002")
    assert code == 2 and "ema=0.002 cannot be made from the 11 snapshot(s)" in err and err.count("\n") == 1
    code, _, err = evaluate(work, monkeypatch, capsys, "run=denoiser", "features=eye", "ema=0.05")
    assert code == 2 and "keeps none; train it with callbacks=diffusion_posthoc" in err
    code, _, err = evaluate(work, monkeypatch, capsys, "run=first_stage", "ema=0.05")
    assert code == 2 and "ema applies only to models that draw images" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["callbacks.sample_quality.features=ey"], 2, "Did you mean 'eye'?"),
        (["callbacks.sample_quality.samples=1"], 2, "'callbacks.sample_quality.samples' must be above 1, not 1"),
        (["data.val=[]"], 2, "scores the last validation, so set data.val"),
        (["callbacks.sample_quality.pictures=cached"], 1, "scores need the images, not their latents"),
    ],
)
def test_a_score_that_cannot_be_costs_no_run(work, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(work)
    if not (work / "cached").exists():
        latents_of(work, "first_stage", "val", "cached")
    name = f"run.name={abs(hash(message))}"
    assert cli.main([*PIXELS, "callbacks.sample_quality.features=eye", *argv, name]) == code
    assert message in capsys.readouterr().err
    assert not list((work / "runs").glob("[0-9]*/checkpoints/*"))
