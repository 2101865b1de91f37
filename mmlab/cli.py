"""The `mmlab` command: `mmlab <verb> …` calls `mmlab.verbs.<verb>.main`. Nothing heavy is imported here."""

import ast
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from mmlab.config.compose import conf_dir
from mmlab.config.errors import ConfigError, UserError, nearest

VERBS = Path(__file__).parent / "verbs"


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code: 0 done, 1 a failed run or bad data, 2 a config error."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return dispatch(argv)
    except UserError as error:
        if str(error):
            print(f"mmlab: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `mmlab … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("mmlab: interrupted", file=sys.stderr)
        return 130


def dispatch(argv: list[str]) -> int:
    """Find the verb and hand it the rest of the command line.

    Raises:
        ConfigError: there is no such verb.
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
    """Return the names of the verbs: the modules of `mmlab/verbs`, with hyphens; `_names` help a verb."""
    names = [path.stem for path in VERBS.glob("[a-z]*.py") if path.stem != "config"]
    return sorted(name.replace("_", "-") for name in names)


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"mmlab.verbs.{verb.replace('-', '_')}")


def usage() -> str:
    """Return the overview, one line a verb, read from the modules' docstrings without importing them."""
    lines = ["mmlab <verb> …   (mmlab <verb> --help says more)", ""]
    for verb in verbs():
        text = ast.get_docstring(ast.parse((VERBS / f"{verb.replace('-', '_')}.py").read_text(encoding="utf-8"))) or ""
        lines.append(f"  {verb:<12} {text.splitlines()[0] if text else ''}".rstrip())
    return "\n".join(lines)


def complete(argv: list[str]) -> int:
    """Answer the shell's question what may follow COMP_LINE (`mmlab completion bash` installs it)."""
    words = os.environ.get("COMP_LINE", "").split(maxsplit=1)
    rest = words[1] if len(words) > 1 else ""
    verb, space, _ = rest.partition(" ")
    if not space:
        print(" ".join(name for name in verbs() if name.startswith(verb)))
        return 0
    if verb not in verbs() or not (conf_dir() / f"{verb}.yaml").is_file():
        return 0
    # Hydra's completion takes the first word for the program.
    os.environ["COMP_LINE"] = rest
    return _module(verb).main(argv)


if __name__ == "__main__":
    sys.exit(main())
