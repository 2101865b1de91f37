"""Print a shell's completion script: eval "$(mmlab completion bash)"."""

import sys

from mmlab.config.compose import start
from mmlab.config.errors import ConfigError, nearest

SHELLS = ("bash", "zsh", "fish")


def main(argv: list[str]) -> int:
    """Print the script for the shell named in `argv`.

    Raises:
        ConfigError: another word than bash, zsh or fish.
    """
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if len(argv) != 1 or argv[0] not in SHELLS:
        hint = nearest(argv[0] if argv else "", SHELLS)
        raise ConfigError(f"Give one shell of {', '.join(SHELLS)}, as in mmlab completion bash.{hint}")
    # Hydra's script completes the command in sys.argv, which is not `mmlab` under `python -m mmlab.cli`.
    program, sys.argv[0] = sys.argv[0], "mmlab"
    try:
        start("train", lenient=True).shell_completion("train", [f"install={argv[0]}"])
    finally:
        sys.argv[0] = program
    return 0
