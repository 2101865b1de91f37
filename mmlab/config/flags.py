"""The command-line flags of the verbs that compose a config: Hydra's, with our errors."""

import argparse
from typing import NoReturn

from hydra import __version__

from mmlab.config.errors import ConfigError, nearest

HELP = ("verb", "groups", "keys")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def parser() -> argparse.ArgumentParser:
    """Return a parser of Hydra's flags.

    Hydra 1.3 cannot make its own on Python 3.14, whose argparse searches each help text for '%': one of them is an
    object without `__contains__` (hydra#3121).
    """
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument
    add("overrides", nargs="*", help="key=value, group=option, +new.key=value or ~removed.key")
    add("--help", "-h", const="verb", nargs="?", choices=HELP, help="Show the verb's help, its groups or its keys")
    add("--hydra-help", action="store_true", help="Show Hydra's flags and groups")
    add("--version", action="version", version=f"Hydra {__version__}", help="Show Hydra's version")
    add("--cfg", "-c", choices=("job", "hydra", "all"), help="Show the composed config and exit")
    add("--resolve", action="store_true", help="With --cfg: resolve interpolations")
    add("--package", "-p", help="With --cfg: the part of the config to show")
    add("--run", "-r", action="store_true", help="Run once")
    add("--multirun", "-m", action="store_true", help="Sweep over key=a,b and key=range(1,4)")
    add("--shell-completion", "-sc", action="store_true", help="Used by the script of `mmlab completion`")
    add("--config-path", "-cp", help="The folder of the root config, instead of the shipped one")
    add("--config-name", "-cn", help="The root config, instead of the verb's")
    add("--config-dir", "-cd", help="A folder of further options")
    add("--experimental-rerun", help="Not supported")
    add("--info", "-i", const="all", nargs="?", choices=INFO, help=f"Explain the config: {', '.join(INFO)}")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read Hydra's flags and the overrides, in any order.

    Raises:
        ConfigError: an unknown or misused flag.
    """
    ours = parser()
    flags = [flag for action in ours._actions for flag in action.option_strings]

    def refuse(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        raise ConfigError(
            f"There is no flag '{unknown}'.{nearest(unknown, flags)}"
            if message.startswith("unrecognized")
            else f"{message[:1].upper()}{message[1:]}."
        )

    ours.error = refuse  # type: ignore[method-assign]
    # These take an optional word, which must not be the override after them.
    alone = {"--info": "--info=all", "-i": "--info=all", "--help": "--help=verb", "-h": "--help=verb"}
    argv = [alone.get(a, a) if "=" in (argv + [""])[i + 1] else a for i, a in enumerate(argv)]
    args = ours.parse_intermixed_args(argv)
    modes = [args.run, args.multirun, args.cfg, args.info, args.shell_completion]
    if sum(map(bool, modes)) > 1:
        raise ConfigError("Only one of --run, --multirun, --cfg, --info and --shell-completion can be given.")
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve requires --cfg.")
    if args.experimental_rerun:
        raise ConfigError("--experimental-rerun is not supported: it reads a pickle, which can run arbitrary code.")
    return args
