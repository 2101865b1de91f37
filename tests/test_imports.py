"""Layers of imports without cycles; settings and the command line import nothing heavy."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmlab

assert mmlab.__file__ is not None
ROOT = Path(mmlab.__file__).parent

BOTTOM = {"config", "runs", "keyed", "weights", "class_names"}
MIDDLE = {"data", "model", "diffusion", "training"}
TOP = {"stage", "evaluate", "report", "curate", "export", "demo"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "keyed": set(),
    "class_names": set(),
    "weights": {"config"},
    "runs": {"config"},
    **dict.fromkeys(MIDDLE, BOTTOM),
    **dict.fromkeys(TOP, MIDDLE | BOTTOM),
    "evaluate": MIDDLE | BOTTOM | {"report"},
    "demo": MIDDLE | BOTTOM | {"evaluate"},
    "verbs": TOP | MIDDLE | BOTTOM,
    # Only dispatches; a verb is imported by name.
    "cli": BOTTOM,
    "__main__": {"cli"},
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name → file of every module in the package folder `root`."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(name: str, path: Path, names_of_modules: set[str]) -> Iterator[tuple[str, int]]:
    """(module of the same package, line) of every import in a file, also inside functions."""
    package = name.split(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*parent[: len(parent) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [full if full in names_of_modules else base for full in names]
        else:
            continue
        yield from ((other, node.lineno) for other in names if other.split(".")[0] == package)


def upward(root: Path) -> list[str]:
    """A line for every import that its layer does not allow."""
    files, wrong = modules(root), []
    for name, path in files.items():
        layer = (name.split(".") + [""])[1]
        if not layer:
            continue
        for other, line in imported(name, path, set(files)):
            target = (other.split(".") + [""])[1]
            if layer not in MAY_IMPORT:
                wrong.append(f"{path.relative_to(root)}: {layer} is in no layer")
            elif target and target != layer and target not in MAY_IMPORT[layer]:
                wrong.append(f"{path.relative_to(root)}:{line} imports {other}")
    return wrong


def cycle(root: Path) -> list[str]:
    """The modules of one cycle of imports, if there is one."""
    files = modules(root)
    after = {n: {o for o, _ in imported(n, p, set(files)) if o in files and o != n} for n, p in files.items()}
    done: set[str] = set()

    def search(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(after[name]):
            if loop := search(other, [*trail, name]):
                return loop
        done.add(name)
        return []

    return next((loop for name in sorted(after) if (loop := search(name, []))), [])


def test_imports_point_down():
    assert upward(ROOT) == []


def test_there_is_no_import_cycle():
    assert cycle(ROOT) == []


def test_every_import_of_mmlab_exists():
    files = modules(ROOT)
    for name, path in files.items():
        for other, line in imported(name, path, set(files)):
            assert other in files, f"{path}:{line} imports {other}"


def test_init_files_are_empty():
    assert [path for path in ROOT.rglob("__init__.py") if path.read_text(encoding="utf-8").strip()] == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("data/a.py", "from mmlab.model.b import B", "data/a.py:1 imports mmlab.model.b"),
        ("training/a.py", "def f():\n    import mmlab.stage.c", "training/a.py:2 imports mmlab.stage.c"),
        ("config/a.py", "from ..verbs import d", "config/a.py:1 imports mmlab.verbs.d"),
        ("stage/a.py", "from mmlab.evaluate import e", "stage/a.py:1 imports mmlab.evaluate.e"),
        ("helpers/a.py", "from mmlab.config import f", "helpers/a.py: helpers is in no layer"),
    ],
)
def test_an_upward_import_is_detected(tmp_path, file, line, message):
    root = tmp_path / "mmlab"
    others = ("model/b.py", "stage/c.py", "verbs/d.py", "evaluate/e.py", "config/f.py")
    for name in (*others, file):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(line if name == file else "")
    assert upward(root) == [message]
    (root / file).write_text("import torch\n")
    assert upward(root) == []


def test_a_cycle_is_detected(tmp_path):
    root = tmp_path / "mmlab"
    (root / "data").mkdir(parents=True)
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (root / "data" / f"{name}.py").write_text(f"def f():\n    from mmlab.data.{other} import x\n")
    assert cycle(root) == ["mmlab.data.a", "mmlab.data.b", "mmlab.data.c", "mmlab.data.a"]
    (root / "data" / "c.py").write_text("")
    assert cycle(root) == []


def test_config_runs_settings_and_the_fetcher_import_nothing_heavy():
    folders = ("mmlab.config", "mmlab.runs", "mmlab.cli", "mmlab.data.remote.fetcher")
    light = [name for name in modules(ROOT) if name.startswith(folders) or name.endswith(".config")]
    light.remove("mmlab.runs.sweep.sweep_picture")  # imported only when a table is written
    assert len(light) > 25
    code = (
        f"import importlib, sys\nfor name in {light}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'numpy', 'wandb', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_no_two_modules_share_a_name():
    names = Counter(path.name for path in ROOT.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} == {"__init__.py", "config.py"}
