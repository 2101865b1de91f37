"""`mmlab sample`, `mmlab eval`, `mmlab export` and `mmlab train` of priors over codes, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmlab import cli
from mmlab.data.index import ShardIndex
from mmlab.evaluate.pictures import sample_files
from mmlab.evaluate.pictures.generators import CodeGenerator
from mmlab.model.code_sampling import CodeSampler
from mmlab.model.config import CodeSamplerConfig
from mmlab.stage.assembly import restore
from tests.evaluate.tiny_scores import contrastive_run, diffusion_run, first_stage_run
from tests.model.tiny_priors import NAMES
from tests.stage.tiny_codes import make_maps
from tests.verbs.tiny_prior_runs import FIRST, prior_run, vq_run


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer_folder) -> Path:
    """A folder with priors that are told a class, a text, a map and nothing, and with their first stages."""
    root = tmp_path_factory.mktemp("work")
    runs = root / "runs"
    first_stage_run(runs)
    diffusion_run(runs, "noise")
    vq_run(runs)
    vq_run(runs, "vq_maps", seed=1)
    prior_run(runs, "class")
    prior_run(runs, "free", ["model/conditioner=none"])
    prior_run(
        runs, "text", ["model/conditioner=text_tiny", f"model.conditioner.tokenizer={tokenizer_folder}"],
    )  # fmt: skip
    maps = ["model/first_stage@model.map_stage=vq_tiny", *(f"{one}" for one in _of_maps(runs))]
    prior_run(runs, "map", ["model/conditioner=map", "model.conditioner.width=12", *maps])
    contrastive_run(runs, tokenizer_folder)
    index = make_maps(root, 12, "train", size=32)
    make_maps(root, 9, "val", size=32)
    for n in range(2):
        (root / f"map{n}.png").write_bytes(index.read(n)["map.png"])
    return root


def _of_maps(runs: Path) -> list[str]:
    sizes, codes = (setting.replace("model.first_stage", "model.map_stage") for setting in FIRST[1:])
    return [sizes, codes, f"model.map_stage.source={runs / 'vq_maps' / 'artifacts' / 'first_stage'}"]


def run(work, monkeypatch, capsys, verb: str, *argv: str) -> tuple[int, str, str]:
    monkeypatch.chdir(work)
    code = cli.main([verb, *argv, *(["trainer.accelerator=cpu"] if verb != "export" else [])])
    out, err = capsys.readouterr()
    return code, out.strip(), err.strip()


def drawn(work, monkeypatch, capsys, out: str, *argv: str) -> dict[str, np.ndarray]:
    """The pictures that a command draws, by file; nothing is told on the way."""
    code, _, err = run(work, monkeypatch, capsys, "sample", *argv, f"out={out}", "strip=0")
    assert (code, err) == (0, "")
    return {path.name: np.array(Image.open(path)) for path in sorted((work / out).glob("[0-9]*.png"))}


def apart(some: np.ndarray, others: np.ndarray) -> int:
    return int(np.abs(some.astype(int) - others.astype(int)).max())


def test_files_and_their_record(work, monkeypatch, capsys):
    asked = ["run=class", "count=5", "seed=7", "batch_size=2", "strip=3", "guidance=2", "top_k=9", "temperature=0.9"]
    code, line, err = run(work, monkeypatch, capsys, "sample", *asked, "top_p=0.95", "out=files")
    assert (code, err) == (0, "") and line == "pictures: files/grid.png, files/strip.png"
    files = [f"{seed:04d}.png" for seed in range(7, 12)]
    assert sorted(path.name for path in (work / "files").iterdir()) == sorted(
        [*files, "grid.png", "strip.png", "samples.json"]
    )
    written = json.loads((work / "files" / "samples.json").read_text())
    about = {name: written[name] for name in ("run", "guidance", "top_k", "top_p", "temperature")}
    assert about == {"run": "class", "guidance": 2, "top_k": 9, "top_p": 0.95, "temperature": 0.9}
    assert [picture["condition"] for picture in written["pictures"]] == [*NAMES, *NAMES[:2]], "all classes in turn"
    model, _ = restore(work / "runs" / "class")
    sampler = CodeSampler(CodeSamplerConfig(temperature=0.9, top_k=9, top_p=0.95, guidance=2))
    expected = CodeGenerator(model, sampler, (16, 16))({"labels": torch.tensor([2])}, [9])[0].permute(1, 2, 0).numpy()
    assert apart(np.array(Image.open(work / "files" / "0009.png")), expected) <= 1


def test_a_picture_depends_on_its_class_its_seed_and_the_settings(work, monkeypatch, capsys):
    def one(out: str, *argv: str) -> np.ndarray:
        return drawn(work, monkeypatch, capsys, out, "run=class", "label=star", *argv)["0003.png"]

    whole = one("whole", "count=4")
    assert apart(one("last", "seed=3", "count=1"), whole) <= 1
    few, other = (one(out, "seed=3", "count=1", more) for out, more in (("few", "top_k=2"), ("it", "label=circle")))
    assert min(apart(few, whole), apart(other, whole)) > 2
    assert apart(one("chosen", "seed=3", "count=1", "sampler=codes", "sampler.top_k=2"), few) == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["run=free"], ["", ""]),
        (["run=text", "prompt='red circle'"], ["red circle"] * 2),
        (["run=map", "map=[map0.png,map1.png]", "guidance=2"], ["map0.png", "map1.png"]),
    ],
)
def test_whatever_it_is_told(work, monkeypatch, capsys, asked, told):
    out = asked[0].removeprefix("run=")
    pictures = drawn(work, monkeypatch, capsys, out, *asked, "count=2")
    assert [one["condition"] for one in json.loads((work / out / "samples.json").read_text())["pictures"]] == told
    assert apart(*pictures.values()) > 2


def test_pictures_larger_than_trained(work, monkeypatch, capsys):
    for name, asked in (("class", ["label=star"]), ("map", ["map=map0.png"])):
        pictures = drawn(work, monkeypatch, capsys, f"large_{name}", f"run={name}", *asked, "size=24", "count=1")
        assert pictures["0000.png"].shape == (24, 24, 3)


def test_a_strip_is_written_row_by_row(work, monkeypatch, capsys):
    sheets = {}
    real = sample_files.contact_sheet

    def kept(pictures, texts, columns, **options):
        sheets[columns] = (pictures, options["labels"])
        return real(pictures, texts, columns, **options)

    monkeypatch.setattr(sample_files, "contact_sheet", kept)
    assert run(work, monkeypatch, capsys, "sample", "run=class", "count=6", "strip=2", "out=strip")[0] == 0
    pictures, labels = sheets[5]
    assert labels == ["random codes", *(f"step {row} of 4" for row in range(1, 5))] * 2
    model, _ = restore(work / "runs" / "class")
    generator = CodeGenerator(model, CodeSampler(CodeSamplerConfig()), (16, 16))
    for row in range(2):
        assert apart(pictures[5 * row].numpy(), generator.decode(generator.noise([row]))[0].numpy()) <= 1
        file = np.array(Image.open(work / "strip" / f"{row:04d}.png")).transpose(2, 0, 1)
        assert np.array_equal(pictures[5 * row + 4].numpy(), file)
        assert apart(pictures[5 * row].numpy(), pictures[5 * row + 1].numpy()) > 2


def test_scores(work, monkeypatch, capsys):
    asked = ["data.path=val", "features=eye", "samples=14", "batch_size=6"]
    chosen = ["data.train_from=train", "guidance=2", "top_k=9", "seed=3", "candidates=2"]
    for name, more in (("class", chosen), ("map", [])):
        out = f"scores_{name}"
        code, told, err = run(work, monkeypatch, capsys, "eval", f"run={name}", *asked, *more, f"out={out}")
        assert code == 0, err
        scores = json.loads((work / out / "scores.json").read_text())
        assert scores["samples"] == 14 and scores["fid"] > 0 and scores["noise_fid"] > 0
        assert scores["temperature"] == 1 and scores["guidance"] == (2 if more else 1) and "fid" in told
        assert (work / out / "samples.png").is_file() and ("neighbours" in scores) is bool(more)
        rows = {"all_codes_fid", "accepted_fid", "confidence", "accepted_confidence", "rejection"}
        assert (rows <= scores.keys()) if more else not rows & scores.keys()
        if more:
            assert scores["all_codes_fid"] != scores["fid"] != scores["accepted_fid"]
            assert scores["accepted_confidence"] > scores["confidence"] and (work / out / "accepted.png").is_file()
            assert "all codes fid" in told and "rejection acceptance" in told and "which flatters accepted_fid" in told


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run=vq", "top_k=5"], "top_k applies only to models that draw images, and vq does not; leave it out."),
        (["run=vq", "candidates=4"], "candidates applies only to models that draw images"),
        (["run=class", "features=eye", "classifier=eye"], "selects among several candidates; set candidates=4 or so."),
        (["run=free", "features=eye", "candidates=4"], "needs a class-conditional model, and free is not one."),
        (
            ["run=class", "features=eye", "candidates=4"],
            "trains a classifier on labeled images; set data.train_from=…",
        ),
        (["run=class", "features=eye", "candidates=0"], "'candidates' must be above 0, not 0"),
        (["run=class", "features=eye", "data.train_from=train", "candidates=2", "classifier=ey"], "Did you mean 'eye'"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(work, monkeypatch, capsys, argv, says):
    monkeypatch.setattr("mmlab.stage.assembly.fill_parts", lambda *_: pytest.fail("weights are loaded"))
    code, _, err = run(work, monkeypatch, capsys, "eval", "data.path=val", *argv)
    assert code == 2 and says in err and "\n" not in err


def test_an_exported_prior(work, monkeypatch, capsys):
    code, line, err = run(work, monkeypatch, capsys, "export", "run=class", "to=diffusers", "out=exported")
    assert (code, line) == (0, 'Pipeline("exported")  # from exported/loader.py'), err
    card = json.loads((work / "exported" / "card.json").read_text())
    assert (card["side"], card["size"], card["codes"], card["sampler"]["top_k"]) == (4, 16, 16, None)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["run=class", "steps=9"], "steps applies only to diffusion models; class is a code prior."),
        (["run=class", "image=x.png"], "image applies only to diffusion models with a sampler of mmlab; leave it out"),
        (["run=noise", "top_k=9"], "top_k applies only to code priors; noise is a diffusion model."),
        (["run=noise", "size=64"], "noise draws images of 8 px, the size it was trained on; leave out size.",),
        (["run=noise", "sampler=codes"], "noise is a diffusion model, which this sampler cannot use; try sampler=ddim"),
        (["run=class", "sampler=ddim"], "class is a code prior, which this sampler cannot use; try sampler=codes"),
        (["run=class", "size=18"], "size=18 must be a multiple of 4 ≥ 16."),
        (["run=class", "size=12"], "was trained on images of 16 px; size=12 must be a multiple of 4 ≥ 16."),
        (["run=class", "top_p=1.5"], "'top_p' must be at most 1, not 1.5"),
        (["run=class", "label=sqare"], "There is no class 'sqare'. Did you mean 'square'?"),
        (["run=free", "guidance=2"], "free is unconditional; guidance has no effect."),
        (["run=map"], "map is map-conditional; set map=…"),
        (["run=map", "map=map9.png"], "map=map9.png cannot be read"),
        (["run=class", "map=map0.png"], "class takes label, not map."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_weights_are_loaded(work, monkeypatch, capsys, argv, says):
    monkeypatch.setattr("mmlab.stage.assembly.fill_parts", lambda *_: pytest.fail("weights are loaded"))
    code, _, err = run(work, monkeypatch, capsys, "sample", *argv)
    assert code == 2 and says in err and "\n" not in err


TRAIN = ["model=code_prior", "data=emoji", "stage=code_prior", "data.size=16", *FIRST, "data.root=.", "logger=none"]
TRAIN += ["model.prior={side: 4, depth: 1, width: 16, heads: 2}", "stage.init_from=[vq]", "data.global_batch=6"]
TRAIN += ["data.micro_batch=3", "trainer.max_steps=4", "trainer=cpu"]


def test_training_from_codes_with_samples_and_an_average(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    for split in ("train", "val"):
        assert cli.main(["shards", "encode", "vq", split, f"codes/{split}"]) == 0
    index = ShardIndex.open(work / "codes" / "train")
    assert len(index) == 12
    source = ["data.train=[{path: codes/train}]", "data.val=[{path: codes/val}]", "data.latents=true"]
    told = ["model/conditioner=class", f"model.conditioner.classes=[{','.join(NAMES)}]", "sampler=codes"]
    more = ["stage.trainable=[prior, conditioner]", "callbacks=code_prior", "callbacks.ema.decay=0.5", "run.name=it"]
    code, _, err = run(work, monkeypatch, capsys, "train", *TRAIN, *source, *told, *more)
    assert code == 0, err
    done = json.loads((work / "runs" / "it" / "done.json").read_text())
    assert done["steps"] == 4 and 1 < done["train/loss"] < 4
    assert Image.open(work / "runs" / "it" / "samples" / "step-4.png").width > 100
    assert drawn(work, monkeypatch, capsys, "trained", "run=it", "count=1")["0000.png"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sampler=ddim"], "samples from codes, but this sampler does not; try sampler=codes"),
        (["process=cosine_v"], "takes no noise process; leave out process."),
        (["stage.init_from=[]"], "The first stage is untrained, so its codes are meaningless"),
        (["model/first_stage=kl_tiny"], "model.first_stage=KLAutoencoder has no codes"),
        (["data.size=32"], "data.size=32 makes 8 x 8 codes, and model.prior.side=4"),
        (["model/conditioner=map"], "map_stage"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(work, monkeypatch, capsys, argv, says):
    given = [one for one in TRAIN if not (argv[0].startswith("model/first") and one in FIRST)]
    code, _, err = run(
        work, monkeypatch, capsys, "train", *given, *argv, f"run.name={argv[0].split('=')[0].replace('/', '_')}"
    )
    assert code == 2 and says in err and "\n" not in err
