"""A real SLURM cluster of one node, and a user's folder with synthetic data to submit jobs from."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmlab import cli
from tests.slurm.jobs import ARGS, ROOT, STEPS, Desk, done

CLUSTER = str(ROOT / "slurm" / "cluster.sh")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The slurm.conf of a cluster started here, or running in the folder MMLAB_TEST_CLUSTER."""
    if running := os.environ.get("MMLAB_TEST_CLUSTER"):
        yield Path(running) / "slurm.conf"
        return
    path = f"{os.environ['PATH']}:/usr/sbin"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]:
        pytest.skip(f"no SLURM here: {', '.join(missing)} missing (apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("cluster")
    subprocess.run([CLUSTER, "up", str(folder)], check=True)
    yield folder / "slurm.conf"
    subprocess.run([CLUSTER, "down", str(folder)], check=True)


@pytest.fixture(scope="session")
def desk(cluster, tmp_path_factory) -> Desk:
    desk = Desk(tmp_path_factory.mktemp("desk"), cluster)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk.folder)
        for words in (
            "build shapes data/shapes/train --split train --count 96",
            "build shapes data/shapes/val --split val --count 8",
            "tokenizer data/shapes/train --out data/shapes/tokenizer --vocab-size 320",
        ):
            assert cli.main(["shards", *words.split()]) == 0
    return desk


@pytest.fixture(scope="session")
def uninterrupted(desk) -> Path:
    """The folder of an uninterrupted run."""
    job = desk.submit(*ARGS, "run.root=uninterrupted")
    assert job.ended() == "COMPLETED", job.log()
    (run,) = (desk.folder / "uninterrupted").iterdir()
    assert done(run)["steps"] == STEPS
    return run
