"""What `trainer.compile` needs of a machine, checked before torch is loaded."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.errors import ConfigError
from mmlab.config.locations import user_cache

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps what it compiles; its own default, below /tmp, is not kept for long."""


def prepare_compiler(trainer: DictConfig) -> None:
    """Check that layers can be compiled here, and set where compiled kernels are kept, unless the environment does.

    Torch compiles C++ for a CPU; for a GPU, Triton compiles a launcher in C. Both include Python's header files.

    Raises:
        ConfigError: a compiler or the header files are missing, or there is no place for the kernels.
    """
    if not trainer.compile:
        return
    if trainer.accelerator in ("gpu", "cuda"):
        variable, language, names = "CC", "C", ("gcc", "clang")
    else:
        variable, language, names = "CXX", "C++", ("clang++" if sys.platform == "darwin" else "g++",)
    named = os.environ.get(variable)
    remedy = "or leave out trainer.compile, which only changes how fast the run is"
    if not any(map(shutil.which, [named] if named else names)):
        what = f"{variable}={named} is no command" if named else f"there is no {' or '.join(names)}"
        raise ConfigError(
            f"trainer.compile=true needs a {language} compiler, but {what}; install one, set {variable}, {remedy}."
        )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        raise ConfigError(
            f"trainer.compile=true needs Python's header files, but there is no {header}; install them (python3-dev), "
            f"{remedy}."
        )
    cache = Path(os.environ.setdefault(CACHE, str(user_cache("compiled"))))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(
            f"trainer.compile=true keeps compiled kernels in {cache}, which cannot be written; set {CACHE} to a folder "
            f"that can, {remedy}."
        )
