"""An installed wheel finds its configs without the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_an_installed_wheel_composes(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = sorted(path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml"))
    folder = tmp_path / "site" / "mmlab" / "conf"
    assert sorted(path.relative_to(folder) for path in folder.rglob("*.yaml")) == shipped
    assert (tmp_path / "site" / "mmlab" / "curate" / "review.html").is_file()
    code = "import sys; from mmlab.cli import main; sys.exit(main(['train', '--info', 'searchpath']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout and str(ROOT) not in done.stdout
