"""A machine that cannot compile is named before anything is built."""

import os
import sysconfig
from pathlib import Path

import pytest

from mmlab.config.errors import ConfigError
from mmlab.runs.compiler import CACHE, prepare_compiler
from mmlab.training.config import TrainerConfig


def prepare(compile: bool = True, accelerator: str = "cpu") -> None:
    prepare_compiler(TrainerConfig(compile=compile, accelerator=accelerator))  # type: ignore[arg-type]


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine with no command in `PATH`."""
    for name in ("CC", "CXX", CACHE):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def add(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("accelerator", "message", "name"),
    [
        ("cpu", r"needs a C\+\+ compiler, but there is no .*\+\+; install one, set CXX, or leave out", "g++"),
        ("auto", r"needs a C\+\+ compiler", "g++"),
        ("gpu", "needs a C compiler, but there is no gcc or clang; install one, set CC, or leave out", "clang"),
    ],
)
def test_a_missing_compiler_is_named(bare, monkeypatch, accelerator, message, name):
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(ConfigError, match=message):
        prepare(accelerator=accelerator)
    prepare(compile=False, accelerator=accelerator)
    add(bare, name)
    prepare(accelerator=accelerator)


def test_the_compiler_of_the_environment_is_the_one_that_counts(bare, monkeypatch):
    add(bare, "g++")
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(ConfigError, match="CXX=icpx is no command"):
        prepare()
    add(bare, "icpx")
    prepare()


def test_missing_header_files_are_named(bare, monkeypatch):
    add(bare, "g++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(bare / name))
    with pytest.raises(ConfigError, match=r"Python's header files, but there is no .*include/Python.h; install them"):
        prepare()


def test_kernels_are_kept_in_the_users_cache(bare, monkeypatch):
    add(bare, "g++")
    prepare(compile=False)
    assert CACHE not in os.environ
    prepare()
    assert os.environ[CACHE] == str(bare / "cache" / "mmlab" / "compiled")
    elsewhere = bare / "elsewhere"
    monkeypatch.setenv(CACHE, str(elsewhere))
    prepare()
    assert os.environ[CACHE] == str(elsewhere) and elsewhere.is_dir()


def test_a_cache_that_cannot_be_written_is_named(bare, monkeypatch):
    add(bare, "g++")
    monkeypatch.setenv(CACHE, str(bare / "g++" / "kernels"))
    with pytest.raises(
        ConfigError, match=r"g\+\+/kernels, which cannot be written; set TORCHINDUCTOR_CACHE_DIR to a fo"
    ):
        prepare()
