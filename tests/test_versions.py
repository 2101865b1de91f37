"""The versions of dependencies: what pyproject.toml allows is what the tests run with."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in group
    if not requirement.startswith("mmlab[")
]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def numbers(version: str) -> list[int]:
    """`2` → [2], `1.25.0` → [1, 25]: trailing zeros say nothing."""
    parts = [int(part) for part in version.split(".")]
    while parts[-1] == 0:
        parts.pop()
    return parts


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_the_lowest_version_is_tested(requirement):
    name, lowest = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(,<[\d.]+)?", requirement).group(1, 2)
    assert numbers(pins("constraints-lowest.txt")[name]) == numbers(lowest)
    assert numbers(pins("constraints.txt")[name]) >= numbers(lowest)
