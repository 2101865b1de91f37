"""A run's folder: what is written, read, redacted and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from mmlab.config.compose import compose, hydra_verb
from mmlab.config.errors import ConfigError, RunError
from mmlab.model.config import MLPConnectorConfig, VisionEncoderConfig
from mmlab.runs.finished_runs import finished
from mmlab.runs.redact import HIDDEN, redact, redact_text
from mmlab.runs.run import find_run, finish, load_run_config, prepare_run
from mmlab.verbs.config import TrainConfig
from tests.config.tiny_conf import write_conf

RECIPE = "experiment=llava/align_tiny"


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_conf(tmp_path / "tree")


def prepare(conf: Path, *overrides: str) -> Path:
    """Start a run, as if something was trained."""
    return started(compose("train", [RECIPE, *overrides], conf))


def started(cfg) -> Path:
    start = prepare_run(cfg)
    if not start.complete:
        start.open()
        start.record({})
    return start.folder


def save_trained(folder: Path) -> None:
    for name in load_run_config(folder).stage.trainable:
        (folder / "artifacts" / name.split(".")[0]).mkdir(parents=True)


def test_the_config_is_read_back_unchanged(conf):
    cfg = compose("train", [RECIPE, "optim.lr=1e-5", "+optim.part_lr.connector=1e-4"], conf)
    back = load_run_config(started(cfg))
    assert OmegaConf.to_container(back, resolve=True) == OmegaConf.to_container(cfg, resolve=True)
    assert [OmegaConf.get_type(node) for node in (back, back.model.vision, back.model.connector)] == [
        TrainConfig,
        VisionEncoderConfig,
        MLPConnectorConfig,
    ]


def test_overrides_and_code_are_written(conf):
    hydra_verb("train", started, ["--config-path", str(conf), RECIPE, "seed=${trainer.max_steps}"])
    (folder,) = Path("runs").iterdir()
    assert (folder / "overrides.txt").read_text().splitlines() == [RECIPE, "seed=${trainer.max_steps}"]
    (state,) = json.loads((folder / "code.json").read_text())
    assert {"starts", "commit", "diff", "new_files", "versions"} == set(state) and state["versions"]["torch"]
    assert "${" not in (folder / "config.yaml").read_text()
    names = [".lock", "code.json", "config.yaml", "identity.json", "overrides.txt"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_no_secret_is_written_to_the_folder(conf, monkeypatch):
    secret = "s3cr3t-0123456789"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("MY_DB_password", "hunter2hunter2")
    overrides = [
        f"model.vision.source=https://user:{secret}@host/model",
        "model.language.source=hunter2hunter2",
        "+model.language.architecture.api_key=plainly",
        "model.language.tokenizer=keep/tokenizer",
    ]
    hydra_verb("train", started, ["--config-path", str(conf), RECIPE, *overrides])
    (folder,) = Path("runs").iterdir()
    text = "".join(path.read_text() for path in folder.iterdir())
    assert secret not in text and "hunter2" not in text and "plainly" not in text
    assert "keep/tokenizer" in text and f"https://user:{HIDDEN}@host/model" in text


def test_redaction_by_key():
    data = {
        "api_key": "x",
        "auth": {"token": "y"},
        "tokens": "keep",
        "tokenizer": "keep",
        "keys": ["keep"],
        "n": 1,
    }
    assert redact(data) == {**data, "api_key": HIDDEN, "auth": {"token": HIDDEN}}
    assert redact_text("+a.api_key=1234") == f"+a.api_key={HIDDEN}"
    assert redact_text("max_new_tokens=12") == "max_new_tokens=12"


def test_the_same_command_reuses_the_folder(conf):
    folder = prepare(conf, "run.name=mine")
    (folder / "marker").touch()
    assert prepare(conf, "run.name=mine", "trainer.devices=2", "data.workers=2", "logger=none") == folder
    assert prepare(conf, "run.name=mine", "data.bad_budget=0.2") == folder
    assert prepare(conf, "run.name=mine", "trainer.strategy=fsdp", "trainer.fsdp.whole_below=1") == folder
    moved = ["data.root=elsewhere", "callbacks.progress=null", "trainer.val_every=2"]
    assert prepare(conf, "run.name=mine", *moved) == folder
    assert (folder / "marker").exists()


def test_another_run_cannot_use_the_folder(conf):
    prepare(conf, "run.name=mine")
    with pytest.raises(ConfigError, match=r"runs/mine contains a run with optim.lr=0.002, not 0.1; give another"):
        prepare(conf, "run.name=mine", "optim.lr=0.1")
    with pytest.raises(ConfigError, match=r"stage.trainable.1=None, not vision"):
        prepare(conf, "run.name=mine", "stage.trainable=[connector,vision]")
    with pytest.raises(ConfigError, match=r"stage.lora.connector.alpha=None, not 256"):
        prepare(conf, "run.name=mine", "+stage.lora.connector.rank=2")


def test_the_micro_batch_of_compared_samples_cannot_change(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def prepare(recipe: str, *overrides: str) -> Path:
        return started(compose("train", [f"experiment=llava/{recipe}", f"run.name={recipe}", *overrides]))

    for recipe in ("align_tiny", "vision_tiny"):
        prepare(recipe)
        prepare(recipe, "trainer.devices=2")
    prepare("align_tiny", "data.micro_batch=2")
    with pytest.raises(ConfigError, match=r"contains a run with data.micro_batch=\d+, not 2; give another run.name"):
        prepare("vision_tiny", "data.micro_batch=2")


def test_a_config_without_a_newer_key_is_resumed_with_its_default(conf):
    config = prepare(conf, "run.name=mine") / "config.yaml"
    before = yaml.safe_load(config.read_text())
    del before["optim"]["weight_decay"], before["seed"]
    config.write_text(yaml.safe_dump(before))
    assert prepare(conf, "run.name=mine") == config.parent
    config.write_text(yaml.safe_dump(before))
    with pytest.raises(ConfigError, match="seed=0, not 1"):
        prepare(conf, "run.name=mine", "seed=1")


def test_a_fresh_run_renames_the_old_one(conf, monkeypatch):
    folder = prepare(conf)
    save_trained(folder)
    finish(folder, {"loss": 1.0})
    assert finished(prepare(conf))
    assert not finished(prepare(conf, "run.fresh=true"))
    assert finished(Path(f"{folder}.1"))
    # A requeued job repeats its command line, and must resume the run that it started.
    save_trained(folder)
    finish(folder, {"loss": 2.0})
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert finished(prepare(conf, "run.fresh=true"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not finished(prepare(conf, "run.fresh=true")), "another job's run is not resumed"


@pytest.mark.parametrize("end", ["trainer.max_steps=9", "trainer.max_epochs=2"])
def test_a_run_with_a_new_end_is_not_complete(conf, end):
    folder = prepare(conf, "run.name=mine")
    finish(folder, {})
    start = prepare_run(compose("train", [RECIPE, "run.name=mine", end], conf))
    assert not start.complete
    start.open()
    assert finished(folder), "nothing has been trained towards the new end"
    start.record({})
    assert not finished(folder)


def test_a_run_is_complete_with_its_artifacts_and_a_readable_record(conf):
    folder = prepare(conf, "run.name=mine")
    cfg = compose("train", [RECIPE, "run.name=mine"], conf)
    finish(folder, {})
    assert not prepare_run(cfg).complete
    save_trained(folder)
    assert prepare_run(cfg).complete
    (folder / "done.json").write_text("")
    with pytest.raises(RunError, match=r"done\.json is damaged"):
        prepare_run(cfg)


def test_a_complete_run_may_lie_on_a_read_only_disk(conf, monkeypatch):
    folder = prepare(conf, "run.name=mine")
    save_trained(folder)
    finish(folder, {})
    (folder / ".lock").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert prepare_run(compose("train", [RECIPE, "run.name=mine"], conf)).complete
    assert not (folder / ".lock").exists()


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.name: path.read_text() for path in files}


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("change", ["trainer.val_every=3", "trainer.devices=2", "callbacks.progress=null"])
def test_values_that_never_ran_are_not_written(conf, done, change):
    folder = prepare(conf, "run.name=mine")
    if done:
        save_trained(folder)
        finish(folder, {"steps": 4})
    before = contents(folder)
    start = prepare_run(compose("train", [RECIPE, "run.name=mine", change], conf))
    assert start.complete == done
    start.open()
    assert contents(folder) == before


def test_a_start_that_trains_keeps_what_ran_before(conf, monkeypatch):
    folder = prepare(conf, "run.name=mine")
    monkeypatch.setattr("mmlab.runs.run.code_state", lambda: {"commit": "other"})
    start = prepare_run(compose("train", [RECIPE, "run.name=mine", "trainer.val_every=3"], conf))
    start.open()
    start.record({"val": {"val": "a"}})
    start.record({"val": {"val": "b"}})
    assert "val_every: 3" in (folder / "config.yaml").read_text()
    first, second = json.loads((folder / "code.json").read_text())
    assert first["versions"]["torch"] and second["commit"] == "other" and len(second["starts"]) == 1
    config, val = json.loads((folder / "identity.json").read_text())["earlier"]
    assert config["config"] == {"trainer.val_every": None} and val["val"] == {"val": "a"}


def test_the_id_of_a_run_stays_until_it_starts_over(conf):
    def start(*overrides: str):
        start = prepare_run(compose("train", [RECIPE, *overrides], conf))
        start.open()
        return start

    assert start().run_id == start().run_id != start("run.fresh=true").run_id


def test_a_run_with_a_damaged_record_starts_over(conf):
    folder = prepare(conf)
    (folder / "identity.json").write_text("{")
    with pytest.raises(RunError, match=r"identity.json is damaged .*start over with run.fresh=true"):
        prepare(conf)
    prepare(conf, "run.fresh=true")
    assert json.loads((folder / "identity.json").read_text())["run"]


def test_only_rank_0_writes(conf, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not prepare(conf).exists()


def test_a_folder_that_cannot_be_created_is_named(conf):
    with pytest.raises(RunError, match=r"/proc/x/llava-align_tiny cannot be created: No such file .*; set run\.root"):
        prepare(conf, "run.root=/proc/x")


def test_a_run_is_locked_by_its_process(conf):
    folder = prepare(conf)
    script = f"""
import fcntl, sys
file = open({str(folder / ".lock")!r}, "a+")
file.seek(0)
print(file.read())
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    sys.exit(7)
"""
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert other.returncode == 7 and f"process {os.getpid()} on " in other.stdout


@pytest.mark.parametrize("fresh", ["false", "true"])
def test_a_locked_run_is_not_touched(conf, fresh):
    folder = Path("runs/llava-align_tiny")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('process 1 on x'); "
    script += "f.flush(); print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=r"process 1 on x is training runs/llava-align_tiny; wait for it"):
            prepare(conf, f"run.fresh={fresh}")
        assert (folder / "config.yaml").read_text() == "{}"
        holder.kill()
    (folder / "config.yaml").unlink()
    prepare(conf, f"run.fresh={fresh}")


def test_a_run_is_found_by_folder_name_and_recipe(conf):
    folder = prepare(conf)
    assert [find_run(name, "runs") for name in (str(folder), "llava-align_tiny", "llava/align_tiny")] == [folder] * 3
    with pytest.raises(ConfigError) as error:
        find_run("llava/aling_tiny", "runs")
    assert str(error.value) == (
        "There is no run 'llava/aling_tiny' in runs. Did you mean 'llava-align_tiny'? Runs there: llava-align_tiny."
    )
    with pytest.raises(ConfigError, match="There is no run 'x' in elsewhere"):
        find_run("x", "elsewhere")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "mmlab.model.vision.VisionEncoder",
            "os.system",
            "'model.vision._target_' 'os.system' is not allowed",
        ),
        ("depth: 3", "dept: 3", "There is no key 'model.connector.dept'"),
        ("depth: 3", "depth: x", "takes a whole number, not 'x'"),
        ("seed: 0", "seed: ${oc.env:HOME}", "contains an interpolation"),
        ("seed: 0", "seed: !!python/object/apply:os.getcwd []", "is not plain YAML"),
        ("\nseed: 0", "\nseed: 0\nsede: 1", "There is no key 'sede'. Did you mean 'seed'?"),
        ("schedule: cosine", "schedule: cosin", "Did you mean 'cosine'?"),
    ],
)
def test_an_invalid_config_file_is_refused(conf, old, new, sentence):
    file = prepare(conf) / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_run_config(file.parent)
    assert sentence in str(error.value)


def test_a_run_of_another_version_is_named(conf):
    folder = prepare(conf)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("mmlab.data.module.ImageTextData", "mmlab.data.module.Gone"))
    with pytest.raises(ConfigError, match=r"is from another version of mmlab: mmlab.data.module.Gone does not exist"):
        load_run_config(folder)


def test_a_folder_without_a_valid_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        load_run_config(tmp_path)
    (tmp_path / "config.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a mapping"):
        load_run_config(tmp_path)
