"""A setting is stated once: in the dataclass beside what it sets."""

import ast
import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmlab.config.build import has_settings, locate
from mmlab.config.fields import Settings
from mmlab.config.schemas import schemas, targets

ROOT = Path(inspect.getfile(Settings)).parents[1]
CONFIGURED = sorted(target for target in targets() if target.startswith("mmlab."))
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def plain_fields(kind: type) -> dict[str, Any]:
    """Name → default of the fields that are neither Hydra's nor parts."""
    own = {f.name: f for f in dataclasses.fields(kind) if not f.name.startswith("_") and "group" not in f.metadata}
    return {name: f.default for name, f in own.items()}


@pytest.mark.parametrize("name", sorted(schemas()))
def test_every_dataclass_checks_its_values_and_names_its_class(name):
    kind = schemas()[name]
    assert issubclass(kind, Settings)
    target = getattr(kind, "_target_", None)
    if target in targets():
        assert f"{target.rpartition('.')[2]}Config" == name
        assert target.split(".")[1] == kind.__module__.split(".")[1], "settings lie in the folder of their class"


def test_a_class_has_one_dataclass():
    counts = Counter(getattr(kind, "_target_", None) for kind in schemas().values())
    assert [target for target, count in counts.items() if target in targets() and count > 1] == []


@pytest.mark.parametrize("target", CONFIGURED)
def test_a_class_takes_its_settings_and_repeats_none_of_them(target):
    kind = next(kind for kind in schemas().values() if getattr(kind, "_target_", None) == target)
    parameters = dict(inspect.signature(locate(target)).parameters)
    first = next(iter(parameters), None)
    assert (first == "config") == has_settings(kind)
    assert not parameters.keys() & plain_fields(kind).keys(), "a setting is passed beside the dataclass"
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert all(default is None for default in defaults), "a constructor states a default of its own"


def repeated_defaults(folder: str, tree: ast.Module) -> Iterator[str]:
    """`function(parameter=default)` for defaults that a dataclass of the same folder states under the same name."""
    stated = [plain_fields(kind) for kind in schemas().values() if kind.__module__ == f"mmlab.{folder}.config"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args
        positional = arguments.posonlyargs + arguments.args
        pairs = [*zip(reversed(positional), reversed(arguments.defaults), strict=False)]
        pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
        for argument, default in pairs:
            if not isinstance(default, ast.Constant) or default.value is None:
                continue
            same = [fields for fields in stated if argument.arg in fields]
            if any(fields[argument.arg] == default.value for fields in same):
                yield f"{node.name}({argument.arg}={default.value!r})"


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name != "config.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_function_repeats_a_default(path):
    assert list(repeated_defaults(path.relative_to(ROOT).parts[0], SOURCES[path])) == []


def literal_choices(tree: ast.Module) -> Iterator[tuple[int, frozenset[str]]]:
    """(line, strings) of each literal tuple, list, set or call of `choice` that holds two or more strings alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            items = node.elts
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "choice":
            items = node.args
        else:
            continue
        values = [item.value for item in items if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        if len(values) == len(items) and len(values) > 1:
            yield node.lineno, frozenset(values)


def test_no_list_of_choices_is_written_twice():
    choices = {
        frozenset(f.metadata["choices"])
        for kind in schemas().values()
        for f in dataclasses.fields(kind)
        if "choices" in f.metadata
    }
    places: dict[frozenset[str], set[str]] = {}
    for path, tree in SOURCES.items():
        for line, values in literal_choices(tree):
            if values in choices:
                places.setdefault(values, set()).add(f"{path.relative_to(ROOT)}:{line}")
    assert {", ".join(sorted(v)): sorted(p) for v, p in places.items() if len(p) > 1} == {}


def test_a_second_statement_is_noticed():
    tree = ast.parse("def f(lr=1e-3, *, schedule='cosine', n=2): ...\nx = ('cosine', 'linear', 'constant')\n")
    assert list(repeated_defaults("training", tree)) == ["f(lr=0.001)", "f(schedule='cosine')"]
    assert [values for _, values in literal_choices(tree)] == [frozenset({"cosine", "linear", "constant"})]
