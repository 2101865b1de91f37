"""`mmlab demo` before it serves anything: mistakes are one sentence."""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import gradio
import pytest
from starlette.testclient import TestClient

from mmlab import cli
from mmlab.config.errors import ConfigError
from mmlab.demo.forms import Drawn, Form, common_form
from mmlab.demo.serving import server, upload_folder
from mmlab.demo.visits import Visit, Visits
from mmlab.verbs import demo


@pytest.fixture(scope="module")
def both(draws, chats, tmp_path_factory):
    """All runs in one folder."""
    root = tmp_path_factory.mktemp("both")
    for run in (*draws.iterdir(), chats / "before"):
        shutil.copytree(run, root / run.name)
    return root


def mistake(capsys, *argv: str) -> str:
    assert cli.main(["demo", *argv]) == 2
    return capsys.readouterr().err.strip().removeprefix("mmlab: ")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["run=first_stage"],
            "first_stage neither answers nor draws; the demo shows vision-language models (a chat about pictures), "
            "latent diffusion and code priors (a form that draws images).",
        ),
        (
            ["run=class", "compare=before"],
            "class and before cannot be compared: one of them answers, and the other one draws.",
        ),
        (["run=before", "port=70000"], "'port' must be at most 65535, not 70000."),
        (["run=before", "host=192.0.2.1"], "Port 7860 of 192.0.2.1 cannot be opened (Cannot assign requested address)"),
        (["run=class", "template=v1"], "class draws images, without a chat template; leave out template."),
        (["run=before", "share=true"], "There is no key or config group 'share'."),
    ],
)
def test_a_mistake_is_one_sentence(both, capsys, argv, sentence):
    error = mistake(capsys, *argv, f"root={both}")
    assert error.startswith(sentence) and "\n" not in error


def test_a_port_in_use(both, capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        error = mistake(capsys, "run=before", f"root={both}", f"port={port}")
    assert error == f"Port {port} of 127.0.0.1 cannot be opened (Address already in use); give another port= or host=."


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert mistake(capsys, "run=x") == "mmlab demo needs Gradio: pip install 'mmlab[demo]'."


class Drawer:
    def __init__(self, name: str, form: Form):
        self.name, self.form = name, form

    def __call__(self, *settings) -> Drawn:
        raise AssertionError("its form alone is needed")


def test_a_form_for_two_runs_has_what_both_have():
    class_run = Drawer("a", Form("class", ["x"], {"sampler": "ddim", "steps": 9}, ["ddim", "heun"], [8, [4, 12]]))
    prior = Drawer("b", Form("class", ["y"], {"guidance": 1.0}, [], [8, 16]))
    assert common_form([class_run]) == class_run.form
    assert common_form([class_run, prior]) == Form("class", ["x"], {}, [], [8])
    with pytest.raises(ConfigError, match=r"a and c cannot be compared: .* \(class\) .* \(text\)"):
        common_form([class_run, Drawer("c", Form("text"))])


def test_uploads_are_deleted_with_the_process():
    code = (
        "import time; from mmlab.demo.serving import upload_folder\n"
        "with upload_folder() as folder:\n"
        "    (folder / 'upload.png').touch(); print(folder, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    folder = child.stdout.readline().strip()
    assert folder.startswith(tempfile.gettempdir())
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    assert not Path(folder).exists()
    before = signal.getsignal(signal.SIGTERM)
    with upload_folder() as inner:
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before and not inner.exists()


@pytest.mark.parametrize(
    ("host", "asked", "status"),
    [
        ("127.0.0.1", "127.0.0.1:7860", 200),
        ("localhost", "localhost:7860", 200),
        ("127.0.0.1", "elsewhere.example", 400),
        ("::1", "[::1]:7860", 200),
        ("::1", "elsewhere.example", 400),
        ("0.0.0.0", "elsewhere.example", 200),
    ],
)
def test_a_local_page_answers_to_local_names_alone(tmp_path, host, asked, status):
    visits = Visits(tmp_path, Visit)
    app = server(gradio.Blocks(), visits, host).config.app
    assert TestClient(app).get("/", headers={"Host": asked}).status_code == status
