"""The `mmlab` command: `mmlab <verb> …` calls `mmlab.verbs.<verb>.main`. Only a verb imports Hydra or torch."""

import ast
import contextlib
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from mmlab.config.disk_errors import disk_error
from mmlab.config.errors import ConfigError, UserError, nearest
from mmlab.runs.terminal import show_traceback, shown_safely

VERBS = Path(__file__).parent / "verbs"


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 success, 1 a failed run or bad data, 2 a config error."""
    argv = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():
        # In a log each refresh of a library's progress bar is a line; tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
    sys.excepthook = show_traceback
    with shown_safely():
        return _run(argv)


def _run(argv: list[str]) -> int:
    """Run one verb; print its error, if it is one for the user."""
    try:
        code = dispatch(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        if str(error):
            print(f"mmlab: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `mmlab … | head`
        _close_output()
        return 1
    except KeyboardInterrupt:
        print("mmlab: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (fault := disk_error(error)) is None:
            raise
        print(f"mmlab: {fault}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            _close_output()  # the output itself may lie on the full disk
        return fault.exit_code


def _close_output() -> None:
    """Discard what is left to print, which Python would try to write once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def dispatch(argv: list[str]) -> int:
    """Pass the arguments after the verb to its module.

    Raises:
        ConfigError: an unknown verb.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("mmlab"))
        return 0
    if argv[:2] in (["-sc", "query=bash"], ["-sc", "query=fish"], ["-sc", "query=zsh"]):
        return complete(argv)
    verb, rest = argv[0], argv[1:]
    if verb not in verbs():
        raise ConfigError(f"There is no verb '{verb}'.{nearest(verb, verbs())} Verbs: {', '.join(verbs())}.")
    return _module(verb).main(rest)


def verbs() -> list[str]:
    """Return the names of the verbs: the public modules of `mmlab/verbs`, with hyphens."""
    return sorted(path.stem.replace("_", "-") for path in VERBS.glob("[a-z]*.py") if path.stem != "config")


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"mmlab.verbs.{verb.replace('-', '_')}")


def usage() -> str:
    """Return the overview: the first line of each verb's docstring, read without importing the module."""
    lines = ["mmlab <verb> …   (for details: mmlab <verb> --help)", ""]
    for verb in verbs():
        text = ast.get_docstring(ast.parse((VERBS / f"{verb.replace('-', '_')}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"  {verb:<12} {text.splitlines()[0] if text else ''}".rstrip())
    return "\n".join(lines)


def complete(argv: list[str]) -> int:
    """Print the possible continuations of COMP_LINE, for the script of `mmlab completion`."""
    rest = os.environ.get("COMP_LINE", "").lstrip().partition(" ")[2].lstrip()
    verb, space, _ = rest.partition(" ")
    if not space:
        print(" ".join(name for name in verbs() if name.startswith(verb)))
        return 0
    from mmlab.config.folders import conf_dir

    if verb not in verbs() or not (conf_dir() / f"{verb}.yaml").is_file():
        return 0
    # Hydra's completion takes the first word as the program.
    os.environ["COMP_LINE"] = rest
    return _module(verb).main(argv)


if __name__ == "__main__":
    sys.exit(main())
