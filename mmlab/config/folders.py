"""Where the config pages lie: the shipped ones, and those of the user's working folder."""

from pathlib import Path

import mmlab
from mmlab.config.errors import ConfigError


def conf_dir() -> Path:
    """Return the folder with `train.yaml` and the config groups.

    Raises:
        ConfigError: the installation is incomplete.
    """
    assert mmlab.__file__ is not None
    package = Path(mmlab.__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"The config folder of mmlab is in neither {package} nor its parent; install the package again.")


def local_conf_dir() -> Path | None:
    """Return `./conf`, the user's own options, if it exists and is not the shipped folder."""
    local = Path("conf").resolve()
    return local if local.is_dir() and local != conf_dir() else None
