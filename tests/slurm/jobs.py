"""Jobs on the test cluster: submit, watch, requeue."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 12
# The probe is in a user's own package, on the Python path.
ARGS = (
    "experiment=llava/language_tiny",
    "trainer=cpu",
    f"trainer.max_steps={STEPS}",
    "trainer.limit_val_batches=0",
    "trainer.log_every_n_steps=1",
    "data.global_batch=4",
    "data.micro_batch=2",
    "+callbacks.probe={_target_: probe.Probe}",
)


@dataclass
class Desk:
    """A user's folder and a cluster.

    Args:
        folder: contains the data; jobs are submitted from it.
        conf: the cluster's slurm.conf.
    """

    folder: Path
    conf: Path

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.env(**environment), capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def env(self, **more: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return inherited | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
            "MMLAB_ALLOW_TARGETS": "probe",
            "OMP_NUM_THREADS": "1",
            "SLURM_CONF": str(self.conf),
            **more,
        }

    def submit(self, *words: str, pause: float = 0.0, script: str = "one_node") -> "Job":
        """Submit one of mmlab's scripts; words that begin with a dash are options of sbatch."""
        options = [word for word in words if word.startswith("-")]
        overrides = [word for word in words if not word.startswith("-")]
        command = ["sbatch", "--parsable", "--cpus-per-task=1", "--time=10", "--signal=USR2@120", *options]
        number = self.run(*command, str(ROOT / "slurm" / f"{script}.sbatch"), *overrides, PROBE_PAUSE=str(pause))
        return Job(self, number)


@dataclass
class Job:
    desk: Desk
    number: str

    def show(self, field: str) -> str:
        """A field of `scontrol show job`, such as JobState."""
        shown = self.desk.run("scontrol", "--oneliner", "show", "job", self.number)
        match = re.search(rf"\b{field}=(\S*)", shown)
        assert match, shown
        return match[1]

    def signal(self, name: str) -> None:
        """Signal the ranks, as SLURM does with --signal."""
        self.desk.run("scancel", f"--signal={name}", self.number)

    def ended(self, seconds: float = 120) -> str:
        """Wait for the end and return the state."""
        states = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.show("JobState") in states, seconds, "its end")
        return self.show("JobState")

    def start_again(self, *changes: str) -> None:
        """Wait until the job is requeued, then change it, and start it without SLURM's delay of two minutes."""
        self.wait(lambda: (self.show("JobState"), self.show("Restarts")) == ("PENDING", "1"), 90, "its requeue")
        # SLURM distinguishes the credentials of two starts by their second.
        time.sleep(2)
        self.desk.run("scontrol", "update", f"JobId={self.number}", *changes, "StartTime=now")

    def wait(self, happened: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"job {self.number} did not reach {what}:\n{self.log()}"
            time.sleep(0.2)

    def log(self) -> str:
        files = [Path(self.show("StdOut"))]
        return "\n".join(file.read_text(errors="replace") for file in files if file.is_file())


def lines(run: Path, rank: int = 0) -> list[dict]:
    """The lines of the probe, one per micro batch."""
    file = run / f"keys-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for_steps(job: Job, run: Path, micro_batches: int = 2) -> None:
    """Wait until a rank has trained some micro batches; a step has four samples, in two micro batches of one rank."""
    job.wait(lambda: len(lines(run)) > micro_batches, 120, f"{micro_batches} micro batches")


def samples(run: Path, ranks: int = 1) -> dict[int, list[str]]:
    """Step → its samples; a repeated step has them twice."""
    steps: dict[int, list[str]] = {}
    for rank in range(ranks):
        for line in lines(run, rank):
            steps.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(keys) for step, keys in steps.items()}


def starts(run: Path) -> list[int]:
    """The number of micro batches in each start of the job."""
    counts: dict[str, int] = {}
    for line in lines(run):
        counts[line["start"]] = counts.get(line["start"], 0) + 1
    return [counts[start] for start in sorted(counts)]


def done(run: Path) -> dict:
    return json.loads((run / "done.json").read_text())
