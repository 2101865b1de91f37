"""`mmlab sample`, as a user types it."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from mmlab import cli
from mmlab.config.build import build
from mmlab.config.compose import compose
from mmlab.config.errors import ConfigError
from mmlab.diffusion.config import ClipConfig, GuidanceConfig, SamplerConfig
from mmlab.evaluate.pictures import sample_files
from mmlab.evaluate.pictures.generators import picture_generator
from mmlab.runs.run import load_run_config
from mmlab.stage.assembly import restore
from mmlab.training.artifacts import save_parts
from mmlab.verbs._generators import check_guidance, run_sampler
from tests.evaluate.tiny_scores import CLASSES, contrastive_run, diffusion_run, first_stage_run
from tests.stage.tiny_diffusion import NAMES

DRAWS = ("model=diffusion", "model/denoiser=unet_tiny", "data=emoji", "stage=latent_diffusion", "process=cosine_v")


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with runs that are told a class, a text and nothing, and one that draws nothing."""
    root = tmp_path_factory.mktemp("work")
    first_stage_run(root / "runs")
    learnt(diffusion_run(root / "runs", "class"))
    text = ["model/conditioner=text_tiny", f"model.conditioner.tokenizer={tokenizer_folder}"]
    learnt(diffusion_run(root / "runs", "text", text))
    learnt(diffusion_run(root / "runs", "free", ["model/conditioner=none"]))
    learnt(diffusion_run(root / "runs", "always_told", [*CLASSES, "model.conditioner.dropout=0"]))
    contrastive_run(root / "runs", tokenizer_folder)
    return root


@torch.no_grad()
def learnt(folder: Path) -> None:
    """A denoiser starts as zero, whatever it is told; this one does not."""
    model, _ = restore(folder)
    torch.manual_seed(1)
    for weight in [*model.denoiser.parameters(), *model.conditioner.parameters()]:
        weight.add_(0.3 * torch.randn_like(weight))
    save_parts(model, ["denoiser", "conditioner"], folder / "artifacts", {"run": folder.name}, {})


def sample(work, monkeypatch, capsys, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main(["sample", *argv, "trainer.accelerator=cpu"])
    out, err = capsys.readouterr()
    return code, out.strip(), err.strip()


def drawn(work, monkeypatch, capsys, out: str, *argv: str) -> dict[str, np.ndarray]:
    """The pictures that a command draws, by file; nothing is told on the way."""
    code, _, err = sample(work, monkeypatch, capsys, *argv, f"out={out}", "strip=0")
    assert (code, err) == (0, "")
    return {path.name: np.array(Image.open(path)) for path in sorted((work / out).glob("[0-9]*.png"))}


def apart(some: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(some.astype(int) - others.astype(int)).max())


def test_files_and_their_record(work, monkeypatch, capsys):
    code, line, err = sample(work, monkeypatch, capsys, "run=class", "count=5", "seed=7", "batch_size=2", "strip=3")
    assert (code, err) == (0, "")
    out = work / "runs" / "class" / "samples" / "1"
    assert line == "pictures: runs/class/samples/1/grid.png, runs/class/samples/1/strip.png"
    files = [f"{seed:04d}.png" for seed in range(7, 12)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, "grid.png", "strip.png", "samples.json"])
    assert {Image.open(out / file).size for file in files} == {(8, 8)}
    written = json.loads((out / "samples.json").read_text())
    assert (written["run"], written["sampler"], written["steps"], written["guidance"]) == ("class", "ddim", 2, 1)
    assert [picture["file"] for picture in written["pictures"]] == files
    assert [picture["seed"] for picture in written["pictures"]] == [7, 8, 9, 10, 11]
    assert [picture["condition"] for picture in written["pictures"]] == [*NAMES, *NAMES[:2]], "all classes in turn"
    assert written["settings"]["count"] == 5 and written["settings"]["label"] is None

    first = (out / "samples.json").read_bytes()
    assert sample(work, monkeypatch, capsys, "run=class", "count=1", "strip=0")[1].endswith("samples/2/grid.png")
    assert (out / "samples.json").read_bytes() == first
    assert not (out.parent / "2" / "strip.png").exists()


def test_a_picture_depends_on_its_class_and_its_seed_alone(work, monkeypatch, capsys):
    asked = ["run=class", "label=star", "sampler.eta=1", "sampler=ddim", "steps=3", "guidance=2"]
    whole = drawn(work, monkeypatch, capsys, "whole", *asked, "count=5", "seed=3")
    parts = drawn(work, monkeypatch, capsys, "parts", *asked, "count=5", "seed=3", "batch_size=2")
    last = drawn(work, monkeypatch, capsys, "last", *asked, "count=1", "seed=7")
    assert list(whole) == list(parts) == [f"{seed:04d}.png" for seed in range(3, 8)] and list(last) == ["0007.png"]
    # Sums of another order may round to the next of 256 values.
    assert all(apart(whole[name], parts[name]) <= 1 for name in whole)
    assert apart(whole["0007.png"], last["0007.png"]) <= 1
    assert all(apart(whole["0003.png"], whole[name]) > 20 for name in list(whole)[1:])
    model, trained = restore(work / "runs" / "class")
    generator = picture_generator(model, run_sampler(trained, steps=3, guidance=2.0)[0], build(trained.process), size=8)
    generator.sampler.own["eta"] = 1
    expected = generator({"labels": torch.tensor([2])}, [7])[0].permute(1, 2, 0).numpy()
    assert apart(expected, last["0007.png"]) <= 1


def test_classes_by_name_number_and_list(work, monkeypatch, capsys):
    def told(out: str, asked: str) -> list[str]:
        assert drawn(work, monkeypatch, capsys, out, "run=class", asked, "count=3")
        return [picture["condition"] for picture in json.loads((work / out / "samples.json").read_text())["pictures"]]

    assert told("name", "label=star") == ["star"] * 3
    assert told("number", "label=1") == ["square"] * 3
    assert told("list", "label=[star,0]") == ["star", "circle", "star"]
    star, square = (np.array(Image.open(work / name / "0000.png")) for name in ("name", "number"))
    assert apart(star, square) > 2


def test_what_the_text_encoder_does_not_read_is_said(work, monkeypatch, capsys):
    length = load_run_config(work / "runs" / "text").model.conditioner.max_length
    long = "red " * 2 * length
    code, _, err = sample(
        work, monkeypatch, capsys, "run=text", "count=3", f"prompt=['{long}end','{long}stop',blue]", "out=cut"
    )
    assert code == 0 and f"the text encoder reads {length} tokens" in err
    assert "red end'" in err and "red stop'" in err and "blue" not in err
    pictures = json.loads((work / "cut" / "samples.json").read_text())["pictures"]
    assert [picture["cut"][-4:] for picture in pictures[:3]] == [" end", "stop", ""]


def test_texts(work, monkeypatch, capsys):
    red = drawn(work, monkeypatch, capsys, "red", "run=text", "prompt='red circle, large'", "count=2")
    blue = drawn(work, monkeypatch, capsys, "blue", "run=text", "prompt=what", "count=2")
    assert json.loads((work / "red" / "samples.json").read_text())["pictures"][1]["condition"] == "red circle, large"
    assert apart(red["0000.png"], blue["0000.png"]) > 2


def test_steps_and_guidance_win_over_the_sampler_s_own(work, monkeypatch, capsys):
    base = drawn(work, monkeypatch, capsys, "base", "run=class", "count=1")["0000.png"]
    short = ["run=class", "count=1", "steps=4", "guidance=3"]
    given = drawn(work, monkeypatch, capsys, "short", *short, "sampler=dpmpp_2m", "sampler.steps=9")["0000.png"]
    long = ["sampler=dpmpp_2m", "sampler.steps=4", "sampler.guidance.scale=3"]
    assert apart(drawn(work, monkeypatch, capsys, "long", "run=class", "count=1", *long)["0000.png"], given) == 0
    written = json.loads((work / "short" / "samples.json").read_text())
    assert (written["sampler"], written["steps"], written["guidance"]) == ("dpmpp_2m", 4, 3)
    one = drawn(work, monkeypatch, capsys, "steps", "run=class", "count=1", "steps=1")["0000.png"]
    strong = drawn(work, monkeypatch, capsys, "guidance", "run=class", "count=1", "guidance=9")["0000.png"]
    assert min(apart(one, base), apart(strong, base), apart(one, strong)) > 2


def test_another_sampler_keeps_the_run_s_guidance_and_clip(work):
    own = ["sampler.guidance={scale: 3, rescale: 0.5}", "sampler.spacing=linspace", "sampler/clip=pixels"]
    own += ["sampler.clip.limit=2", "sampler.eta=0.5", "sampler.steps=7"]
    trained = compose("train", [*DRAWS, "sampler=ddim", *own])

    def settings(*overrides: str) -> SamplerConfig:
        chosen = compose("sample", ["run=class", *overrides])
        return run_sampler(trained, chosen.sampler, steps=chosen.steps)[0].config

    def differ(*overrides: str) -> dict[str, object]:
        return {key: value for key, value in vars(settings(*overrides)).items() if value != vars(settings())[key]}

    assert settings().clip.limit == 2 and differ() == {}
    assert differ("sampler=euler") == {"name": "euler", "eta": None}
    assert differ("sampler=ddim") == {}
    assert differ("sampler=dpmpp_2m") == {"name": "dpmpp_2m", "steps": 20, "eta": None}
    assert differ("sampler=dpmpp_2m", "steps=7") == {"name": "dpmpp_2m", "eta": None}
    assert differ("sampler=ddim", "sampler.eta=0", "sampler.spacing=trailing") == {"eta": 0, "spacing": "trailing"}
    assert differ("sampler=ddim", "sampler.clip=null", "sampler.steps=50") == {"clip": None, "steps": 50}
    assert differ("sampler=ddim", "sampler/clip=pixels") == {"clip": ClipConfig()}
    assert differ("sampler=ddim", "sampler.guidance.scale=1") == {"guidance": GuidanceConfig(1, rescale=0.5)}
    with pytest.raises(ConfigError, match=r"no key 'sampler\.stps'"):
        settings("sampler=ddim", "+sampler.stps=3")
    with pytest.raises(ConfigError, match=r"sampler\.steps.* above 0"):
        settings("sampler=ddim", "sampler.steps=0")


def test_a_strip_leads_from_noise_to_the_sample(work, monkeypatch, capsys):
    sheets = {}
    real = sample_files.contact_sheet

    def kept(pictures, texts, columns, **options):
        sheets[columns] = (pictures, texts, options["labels"])
        return real(pictures, texts, columns, **options)

    monkeypatch.setattr(sample_files, "contact_sheet", kept)
    asked = ["run=class", "count=6", "batch_size=2", "strip=3", "steps=12", "seed=2", "out=strip"]
    assert sample(work, monkeypatch, capsys, *asked)[0] == 0
    pictures, texts, labels = sheets[9]
    steps = [2, 3, 5, 6, 8, 9, 11, 12]
    assert labels == ["x_T: noise", *(f"step {number} of 12" for number in steps)] * 3
    assert texts[::9] == [f"seed {2 + n}\n{NAMES[n]}" for n in range(3)]
    model, trained = restore(work / "runs" / "class")
    generator = picture_generator(model, run_sampler(trained)[0], build(trained.process), size=8)
    noise = generator.decode(generator.noise([2, 3, 4]))
    for row in range(3):
        start, end = pictures[9 * row], pictures[9 * row + 8]
        assert apart(start.numpy(), noise[row].numpy()) <= 1
        file = np.array(Image.open(work / "strip" / f"{2 + row:04d}.png")).transpose(2, 0, 1)
        assert np.array_equal(end.numpy(), file)
    assert Image.open(work / "strip" / "strip.png").width > 9 * 128


def test_images_to_start_from_with_masks(work, monkeypatch, capsys):
    Image.effect_noise((12, 8), 80).convert("RGB").save(work / "a.png")
    Image.new("RGB", (8, 8), "navy").save(work / "b.png")
    for name, size in (("mask_a", (12, 8)), ("mask_b", (8, 8))):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, 6, 8))
        mask.save(work / f"{name}.png")
    titles = []
    real = sample_files.contact_sheet

    def kept(pictures, *args, **options):
        titles.append((options["title"], [tuple(picture.shape) for picture in pictures]))
        return real(pictures, *args, **options)

    monkeypatch.setattr(sample_files, "contact_sheet", kept)
    asked = ["run=class", "image=[a.png,b.png]", "mask=[mask_a.png,mask_b.png]", "count=4", "strength=0.5", "steps=4"]
    code, _, err = sample(work, monkeypatch, capsys, *asked, "out=inpainted", "strip=2")
    assert (code, err) == (0, "")
    assert titles[0][0].startswith("input, mask, result; class: ") and titles[0][1] == [(3, 8, 24)] * 4
    assert titles[1][1] == [(3, 8, 8)] * 6, "two rows: the start, the first step, the result"
    written = json.loads((work / "inpainted" / "samples.json").read_text())
    assert written["strength"] == 0.5 and written["pictures"][3]["image"] == "b.png"
    assert [picture["mask"] for picture in written["pictures"]] == ["mask_a.png", "mask_b.png"] * 2
    one = ["run=class", "image=b.png", "count=1", "steps=4"]
    little = drawn(work, monkeypatch, capsys, "little", *one, "strength=0.25")["0000.png"]
    much = drawn(work, monkeypatch, capsys, "much", *one)["0000.png"]
    again = drawn(work, monkeypatch, capsys, "again", *one, "strength=0.8", "label=circle")["0000.png"]
    assert json.loads((work / "much" / "samples.json").read_text())["strength"] == 0.8 and apart(much, again) == 0
    assert apart(little, much) > 2
    assert drawn(work, monkeypatch, capsys, "free_image", "run=free", "image=b.png", "count=1")
    text = ["run=text", "prompt=red", "image=b.png", "mask=mask_b.png", "count=1"]
    assert drawn(work, monkeypatch, capsys, "text_image", *text)
    assert json.loads((work / "text_image" / "samples.json").read_text())["strength"] == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run=class", "image=gone.png"], "image=gone.png cannot be read: [Errno 2] No such file"),
        (["run=class", "image=[]"], "image=[] must be a file, or a list of at least one."),
        (["run=class", "mask=a.png"], "mask=a.png needs an image to start from; set image=<file>, or leave it out."),
        (["run=class", "strength=0.5"], "strength=0.5 needs an image to start from"),
        (["run=class", "image=x.png", "strength=1.5"], "'strength' must be at most 1, not 1.5"),
        (
            ["run=class", "image=x.png", "strength=0.33", "steps=3"],
            "strength=0.33 of 3 steps is no step; raise it to 0.334 or more.",
        ),
        ([], "'run' has no value; give run="),
        (["run=clas"], "There is no run 'clas' in runs. Did you mean 'class'?"),
        (["run=eye"], "eye is not a generative model; choose a run of stage=latent_diffusion or"),
        (["run=first_stage"], "first_stage is not a generative model"),
        (["run=class", "label=sqare"], "There is no class 'sqare'. Did you mean 'square'?"),
        (["run=class", "label=[star,3]"], "There is no class '3'."),
        (["run=class", "label=[]"], "label=[] must be a class, or a list of at least one."),
        (["run=class", "label={a:1}"], "must be a class"),
        (["run=text", "prompt=[]"], "prompt=[] must be a text, or a list of at least one."),
        (["run=text", "prompt=[null]"], "must be a text"),
        (["run=text", "prompt=[[a]]"], "must be a text"),
        (["run=class", "prompt=star"], "class takes label, not prompt."),
        (["run=text", "label=star", "prompt=star"], "text takes prompt, not label."),
        (["run=text"], "text is text-conditional; set prompt=…"),
        (["run=free", "label=star"], "free is unconditional; leave out label."),
        (["run=free", "prompt=star"], "free is unconditional; leave out prompt."),
        (["run=free", "guidance=2"], "free is unconditional; guidance has no effect. Set guidance=1."),
        (["run=class", "steps=0"], "'steps' must be above 0, not 0."),
        (["run=class", "steps=2000"], "2000"),
        (["run=class", "guidance=-1"], "'guidance' must be at least 0, not -1"),
        (["run=class", "labl=star"], "Did you mean 'label'?"),
        (["run=class", "label=star,square"], "write label=[star,square] for a list"),
        (["run=class", "sampler=dimm"], "Did you mean 'ddim'?"),
        (["run=class", "out=runs"], "runs is not empty; choose another out"),
        (["run=class", "out=runs/class/config.yaml"], "config.yaml is a file; give a folder as out="),
    ],
)
def test_a_mistake_is_one_sentence_before_weights_are_loaded(work, monkeypatch, capsys, argv, says):
    monkeypatch.setattr("mmlab.stage.assembly.fill_parts", lambda *_: pytest.fail("weights are loaded"))
    code, _, err = sample(work, monkeypatch, capsys, *argv)
    assert code == 2 and says in err and "\n" not in err


def test_samples_are_not_mixed_with_others(work, monkeypatch, capsys):
    asked = ["run=class", "count=2", "label=[star]", "out=mine"]
    assert sample(work, monkeypatch, capsys, *asked)[0] == 0
    before = (work / "mine" / "0000.png").read_bytes()
    assert sample(work, monkeypatch, capsys, *asked, "batch_size=1")[0] == 0
    code, _, err = sample(work, monkeypatch, capsys, *asked, "seed=1")
    assert code == 2 and "mine holds samples with seed=0, not 1; choose another out" in err
    assert (work / "mine" / "0000.png").read_bytes() == before


def test_without_a_condition_and_with_one_that_never_was_dropped(work, monkeypatch, capsys):
    assert len(drawn(work, monkeypatch, capsys, "free", "run=free", "count=3")) == 3
    code, _, err = sample(work, monkeypatch, capsys, "run=always_told", "count=1", "guidance=2")
    assert code == 0 and "conditioner.dropout=0" in err
    assert sample(work, monkeypatch, capsys, "run=always_told", "count=1")[2] == ""


def test_a_published_denoiser_knows_the_unconditional_case(capsys):
    conditioner = SimpleNamespace(reads="text", dropout=0)
    for source in (None, "owner/name"):
        check_guidance("run", 2, conditioner, OmegaConf.create({"model": {"denoiser": {"source": source}}}))
        assert ("conditioner.dropout=0" in capsys.readouterr().err) == (source is None)


def test_it_is_listed(capsys):
    assert cli.main([]) == 0
    assert "sample       Draw images with a trained generative model." in capsys.readouterr().out
    assert cli.main(["sample", "--help", "keys"]) == 0
    assert "\nlabel: null" in capsys.readouterr().out


def test_a_model_that_learned_buckets_draws_their_sizes(work, monkeypatch, capsys):
    learnt(diffusion_run(work / "runs", "shaped", [*CLASSES, "data.buckets={max_aspect: 3, step: 4}"]))
    Image.new("RGB", (30, 10), "red").save(work / "wide.png")
    asked = ["run=shaped", "count=3", "label=star"]
    for out, *options in (["wide", "size=[4,12]"], ["tall", "size=[12,4]"], ["kept", "size=[4,12]", "image=wide.png"]):
        pictures = drawn(work, monkeypatch, capsys, f"shaped_{out}", *asked, *options)
        assert {picture.shape for picture in pictures.values()} == {(12, 4, 3) if out == "tall" else (4, 12, 3)}
    assert {picture.shape for picture in drawn(work, monkeypatch, capsys, "squares", *asked).values()} == {(8, 8, 3)}
    for run, size, message in (
        ("shaped", "[4,8]", r"shaped was not trained on images of 4x8 px; its nearest bucket is size=[4, 12]."),
        ("shaped", "wide", "size=wide must be a side in pixels, or [height, width]."),
        ("shaped", "[8,8,8]", "size=[8, 8, 8] must be a side in pixels"),
        ("class", "[4,12]", "class draws images of 8 px, the size it was trained on; leave out size."),
    ):
        code, _, err = sample(work, monkeypatch, capsys, f"run={run}", f"size={size}")
        assert code == 2 and message in err
