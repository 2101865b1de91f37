"""The code that a run was started with: commit, uncommitted changes, versions of packages, a hash of the sources."""

import hashlib
import importlib.util
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mmlab
from mmlab.config.build import allowed_prefixes

PACKAGES = (
    "mmlab",
    "torch",
    "lightning",
    "transformers",
    "diffusers",
    "tokenizers",
    "hydra-core",
    "omegaconf",
    "webdataset",
    "numpy",
    "pillow",
    "simplejpeg",
    "wandb",
)


def code_state() -> dict[str, Any]:
    """Return the commit, the uncommitted diff, the names of untracked files and the versions of packages."""
    state: dict[str, Any] = {"versions": versions()}
    state["commit"] = commit()
    state["diff"] = _git("diff", "HEAD", "--", ".") if state["commit"] else None
    new = _git("ls-files", "--others", "--exclude-standard")
    state["new_files"] = new.splitlines() if new else []
    return state


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that decide what is computed; None for one that is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Return the commit of mmlab's own repository, None if it was installed without one."""
    return _git("rev-parse", "HEAD")


def source_hash() -> str:
    """SHA-256 over the Python files of mmlab and of the packages in MMLAB_ALLOW_TARGETS, committed or not."""
    digest = hashlib.sha256()
    for name in ("mmlab", *sorted({prefix.split(".")[0] for prefix in allowed_prefixes()})):
        for root in _places(name):
            files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
            for file in files:
                digest.update(f"{name} {file.relative_to(root.parent)}\n".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _places(package: str) -> list[Path]:
    """The folders of a package, or the file of a module; nothing is imported."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place) for place in spec.submodule_search_locations]
    return [Path(spec.origin)] if spec.origin and Path(spec.origin).is_file() else []


def _git(*command: str) -> str | None:
    """The output of a git command in mmlab's own repository; None if there is none or git fails."""
    assert mmlab.__file__ is not None
    root = Path(mmlab.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
