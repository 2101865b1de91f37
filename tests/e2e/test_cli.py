"""The command line: errors, exit codes, help, and imports of commands that must be fast."""

import subprocess
import sys

import pytest

from mmlab import cli
from tests.config.tiny_conf import write_conf

RECIPE = "experiment=llava/align_tiny"
PARTS = ("model=llava", "data=shapes", "stage=align")


@pytest.fixture
def conf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_conf(tmp_path / "tree")


def refused(capsys, *argv: str) -> str:
    """Run a command that must fail with a config error, and return its one line."""
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    assert code == 2, (out, err)
    assert out == "" and err.startswith("mmlab: ") and err.endswith("\n")
    line = err.removeprefix("mmlab: ").rstrip("\n")
    assert "\n" not in line and "Traceback" not in line
    return line


CASES = {
    # an unknown key, at any depth, also with a plus
    "optim.lrr=1": "There is no key 'optim.lrr'. Did you mean 'lr'?",
    "model.connector.depht=1": "There is no key 'model.connector.depht'. Did you mean 'depth'?",
    "+optim.weight_deca=1": "There is no key 'optim.weight_deca'. Did you mean 'weight_decay'?",
    "++model.vision.sourc=x": "There is no key 'model.vision.sourc'. Did you mean 'source'?",
    "+sede=1": "There is no key 'sede'. Did you mean 'seed'?",
    "+data.train.0.pth=1": "There is no key 'data.train.0.pth'. Did you mean 'path'?",
    "~optmi": "There is no key or config group 'optmi'. Did you mean 'optim'?",
    "+seed=1": "'seed' exists already; give it without the +.",
    # … in a section that is not part of a root's dataclass
    "callbacks.chekpoint.keep=3": "There is no key 'callbacks.chekpoint'. Did you mean 'checkpoint'?",
    "callbacks.checkpoint.evry_n_steps=3": "There is no key 'callbacks.checkpoint.evry_n_steps'. "
    "Did you mean 'every_n_steps'?",
    "callbacks.samples.conut=3": "There is no key 'callbacks.samples.conut'. Did you mean 'count'?",
    "callbacks.checkpoint.xyz=3": "There is no key 'callbacks.checkpoint.xyz'. "
    "Keys there: every_n_steps, folder, grace_s, keep.",
    "model.vision.architecture.hiden_size=3": "There is no key 'model.vision.architecture.hiden_size'. "
    "Did you mean 'hidden_size'?",
    # an invalid type or value
    "optim.lr=abc": "'optim.lr' takes a number, not 'abc'.",
    "seed=1.5": "'seed' takes a whole number, not '1.5'.",
    "data.pack=maybe": "'data.pack' takes true or false, not 'maybe'.",
    "seed=null": "'seed' cannot be null.",
    "stage.trainable=connector": "'stage.trainable' takes a list, as in stage.trainable=[a,b].",
    "trainer=3": "Config group 'trainer' takes the name of an option, not 3.",
    "run=3": "'run' is a section with its own keys; give run.<key>=….",
    "optim.schedule=cosin": "'optim.schedule' cannot be 'cosin'. Did you mean 'cosine'? "
    "Options: cosine, constant, linear.",
    "optim.lr=0": "'optim.lr' must be above 0, not 0.0.",
    "optim.warmup_ratio=3": "'optim.warmup_ratio' must be at most 1, not 3.0.",
    "model.vision.source=${nope}": "'model.vision.source' cannot be resolved: Interpolation key 'nope' not found.",
    # an unknown group or option
    "model=lava": "Config group 'model' has no option 'lava'. Did you mean 'llava'? Options: dual, llava.",
    "model/connector=liner": "Config group 'model/connector' has no option 'liner'. Did you mean 'linear'? "
    "Options: linear, mlp.",
    "experiment=llava/align": "Config group 'experiment' has no option 'llava/align'. "
    "Did you mean 'llava/align_tiny'? Options: llava/align_tiny.",
    "debug=fst": "Config group 'debug' has no option 'fst'. Did you mean 'fast'? Options: fast, overfit, profile.",
    "debug=null": "Config group 'debug' takes the name of an option; leave it out to choose none.",
    "modle=llava": "There is no key or config group 'modle'. Did you mean 'model'?",
    "model/conector=mlp": "There is no config group 'model/conector'. Did you mean 'model/connector'?",
    "model.connector=mlp": "'model.connector' is a config group; choose its option with model/connector=mlp.",
    # syntax
    "seed": "'seed' is not of the form key=value.",
    "a=[1": "'a=[1' cannot be read as key=value: no viable alternative at input '[1' "
    "(put quotes around special characters).",
    "seed=1,2": "'seed=1,2' is a sweep: add -m to run each value, or write seed=[1,2] for a list.",
    "seed=range(3)": "'seed=range(3)' is a sweep: add -m.",
    # a missing value
    "stage=open": "'stage.trainable' has no value; give stage.trainable=…",
}


@pytest.mark.parametrize(("override", "sentence"), CASES.items(), ids=CASES)
def test_an_error_is_one_sentence(conf, capsys, tmp_path, override, sentence):
    base = PARTS if override.startswith("experiment") else (RECIPE,)
    assert refused(capsys, "train", "--config-path", str(conf), *base, override) == sentence
    assert not (tmp_path / "runs").exists()


def test_an_argument_of_a_class_without_a_dataclass_is_suggested(conf, capsys):
    monitor = "+callbacks.rate={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    line = refused(capsys, "train", "--config-path", str(conf), RECIPE, monitor, "callbacks.rate.log_momentun=true")
    assert line.endswith("'callbacks.rate.log_momentun'. Did you mean '+callbacks.rate.log_momentum=…'?")


def test_a_missing_choice_is_refused(conf, capsys):
    line = refused(capsys, "train", "--config-path", str(conf), "model=llava", "data=shapes")
    assert line == "No stage is chosen; give stage=<option> (align, open) or a recipe with experiment=<name>."


def test_recipes_of_the_same_folder_are_listed(conf, capsys):
    (conf / "experiment" / "a").mkdir()
    for number in range(12):
        (conf / "experiment" / "a" / f"{number}.yaml").touch()
    base = ("train", "--config-path", str(conf))
    assert refused(capsys, *base, "experiment=llava/zzz").endswith("'llava/zzz'. Options: llava/align_tiny.")
    assert "Options: a/0, a/1, " in refused(capsys, *base, "experiment=lava/align")


def test_an_error_in_a_file_names_the_file(conf, capsys):
    recipe = conf / "experiment" / "llava" / "align_tiny.yaml"
    recipe.write_text(recipe.read_text() + "seeed: 3\n")
    line = refused(capsys, "train", "--config-path", str(conf), RECIPE)
    assert line == "In experiment/llava/align_tiny: There is no key 'seeed'. Did you mean 'seed'?"
    recipe.write_text("a: [1\nb: 2\n")
    line = refused(capsys, "train", "--config-path", str(conf), RECIPE)
    assert f"{recipe}, line 2 is not valid YAML" in line
    recipe.write_text(
        "# @package _global_\ndefaults:\n  - override /model: lava\n  - override /stage: align\n"
        "  - override /data: shapes\n"
    )
    line = refused(capsys, "train", "--config-path", str(conf), RECIPE)
    assert line.startswith("Config group 'model' has no option 'lava'. Did you mean 'llava'?")


def test_other_roots(conf, capsys):
    base = ("--config-path", str(conf))
    assert refused(capsys, "eval", *base) == "'run' has no value; give run=…"
    assert "'maxnew_tokens'. Did you mean 'max_new_tokens'?" in refused(capsys, "chat", *base, "maxnew_tokens=1")


def test_verbs_and_flags(capsys):
    assert refused(capsys, "trian").startswith("There is no verb 'trian'. Did you mean 'train'?")
    assert refused(capsys, "train", "--cgf", "job") == "There is no flag '--cgf'. Did you mean '--cfg'?"
    assert "Did you mean 'bash'?" in refused(capsys, "completion", "bsh")
    assert refused(capsys, "train", "--config-dir", "/nope") == "There is no config folder /nope."


def test_overview_lists_every_verb(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.verbs())


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_answers_help(capsys, verb):
    try:
        code = cli.main([verb, "--help"])
    except SystemExit as stop:  # argparse
        code = stop.code
    assert code == 0 and f"mmlab {verb}" in capsys.readouterr().out


def test_completion(capsys, monkeypatch):
    def complete(line: str) -> list[str]:
        monkeypatch.setenv("COMP_LINE", line)
        assert cli.main(["-sc", "query=bash"]) == 0
        return capsys.readouterr().out.split()

    assert complete("mmlab tra") == ["train"]
    assert "optim.lr=" in complete("mmlab train optim.l")
    assert complete("mmlab train debug=f") == ["debug=fast"]
    assert "experiment=llava/align_tiny" in complete("mmlab train experiment=llava/al")
    assert complete("mmlab train sche") == []
    assert complete("mmlab completion ") == []
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion mmlab")


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["completion", "zsh"]])
def test_light_commands_import_nothing_heavy(tmp_path, command):
    code = (
        "import sys; from mmlab.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'wandb', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "[]", done.stderr
    assert done.stdout and not list(tmp_path.iterdir())


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "mmlab.cli", "train", "modle=llava"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mmlab: There is no key or config group 'modle'. Did you mean 'model'?\n"


def test_libraries_draw_no_progress_bars_in_a_log():
    code = "from mmlab import cli; cli.main(['--version']); from tqdm.auto import tqdm; list(tqdm(range(3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
