"""A sequence of commands."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from mmlab import cli


def carry_out(folder: Path, commands: Iterable[str]) -> Path:
    """Run `mmlab` with each command in a folder, which is returned; every command must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            assert cli.main(command.split()) == 0, command
    return folder
