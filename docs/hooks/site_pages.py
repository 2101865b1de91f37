"""Hooks of MkDocs: the site has the repository's paths, so that links between pages are those that GitHub follows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import config_keys
import github_markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mmlab"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "docs/*.md", "experiments/*/README.md")
ASSETS, ENDINGS = ("docs", "experiments", "benchmarks"), (".png", ".jpg", ".svg", ".css")
KEYS, API, LAB_BOOK = "reference/keys.md", "reference/api.md", "experiments/index.md"
NETWORK = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\bhref=[\"']?(?:https?:)?//[^>]*>|@import\b[^;]*//[^;]*;|url\([\"']?(?:https?:)?//[^)]*\)"
)


def on_config(config: MkDocsConfig) -> None:
    """Complete the navigation: the lab book, and the API pages by folder."""
    for entry in config.nav:
        if "Lab book" in entry:
            entry["Lab book"] = [LAB_BOOK, *(f"experiments/{name}/README.md" for name in _experiments())]
        if "Reference" in entry:
            folders: dict[str, list[dict[str, str]]] = {}
            for module in _modules():
                folder, _, name = module.removeprefix("mmlab.").rpartition(".")
                folders.setdefault(folder or "mmlab", []).append({name: f"reference/{module}.md"})
            entry["Reference"].append({"API": [API, *({name: pages} for name, pages in folders.items())]})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by all pages and their pictures, at their paths in the repository."""
    theirs = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    paths = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    paths += [path for folder in ASSETS for path in (ROOT / folder).rglob("*") if path.suffix in ENDINGS]
    own = [File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)) for path in sorted(paths)]
    written = {KEYS: config_keys.page(), API: _api(), LAB_BOOK: _lab_book()}
    written |= {f"reference/{module}.md": f"# {module}\n\n::: {module}\n" for module in _modules()}
    own += [File.generated(config, name, content=content) for name, content in written.items()]
    return Files([*theirs, *own])


def on_page_markdown(markdown: str, **_) -> str:
    return github_markdown.separate_blocks(markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Check that no page needs a network.

    Raises:
        PluginError: a page or style sheet that loads a script, font, style or picture from elsewhere.
    """
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (match := NETWORK.search(path.read_text(encoding="utf-8"))):
            raise PluginError(f"{path.relative_to(config.site_dir)} loads from a network: {match[0]}")


def _experiments() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("experiments/*/README.md"))


def _lab_book() -> str:
    """The first page of the lab book: the experiments, each with its title and the first sentence of what it is."""
    rows = []
    for name in _experiments():
        text = (ROOT / "experiments" / name / "README.md").read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        rows.append(f"| [{name}]({name}/README.md) | {title} |")
    return "\n".join(["# Lab book", "", _LAB_BOOK, "", "| experiment | what it is |", "|---|---|", *rows, ""])


_LAB_BOOK = """Each experiment is a folder in `experiments/` with a page, its script (`run.sh DATA OUT`), and
the figures that it printed (`results.json`). A page states what was run, what came out, on what hardware, and
what did not work."""


def _modules() -> list[str]:
    """The public modules, but the settings (which have a page of their own) and the verbs (which are commands)."""
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("_") and path.name != "config.py" and path.parent.name != "verbs"
    )


def _api() -> str:
    """The table of all modules with the first lines of their docstrings."""
    rows = [f"| [{module}]({module}.md) | {line} |" for module, line in _first_lines()]
    words = "Modules of the package and what each is for. The commands are described by `mmlab --help`."
    return "\n".join(["# API", "", words, "", "| module | what it is |", "|---|---|", *rows, ""])


def _first_lines() -> Iterator[tuple[str, str]]:
    for module in _modules():
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        yield module, (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0].replace("\n", " ")
