"""SIGKILL a run that checkpoints every step and validates every other one: kill_matrix.py OUT [KILLS].

Each start is a fork of this process, with all imports done, and is killed after a random time. After each kill the
newest checkpoint must be complete and at most one step behind, and at most one partial checkpoint may be left. At the
end the run must be bitwise equal to an uninterrupted run, with all its metrics. The last line is one JSON object.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import transformers.models.siglip.modeling_siglip  # noqa: F401  imported before the forks, which then start fast

import mmlab.data.module
import mmlab.stage.contrastive
import mmlab.training.trainer  # noqa: F401
from mmlab import cli
from mmlab.training.checkpoint_io import newest_whole, read, steps
from mmlab.training.resume_proof import SPEED, difference, read_batches, results

RECIPE = [
    "experiment=llava/vision_tiny",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.workers=0",
    "data.val=[{path:train,name:val}]",
    "trainer=cpu",
    "trainer.val_every=2",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "model.vision.architecture.num_hidden_layers=1",
    "callbacks.checkpoint.every_n_steps=1",
    "+callbacks.batch_log._target_=mmlab.training.resume_proof.BatchLog",
]


# Never reached: kills end the run, and the last start trains two steps beyond the newest checkpoint.
LENGTH = 1_000_000


def main(out: Path, kills: int = 100) -> int:
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    cli.main(["shards", "build", "shapes", "data/shapes/train", "--count", "64", "--overwrite"])
    cli.main(["shards", "tokenizer", "data/shapes/train", "--out", "data/shapes/tokenizer", "--vocab-size", "320"])
    run = Path("killed")
    random.seed(0)
    figures: dict[str, Any] = dict.fromkeys(
        ("kills", "in_a_save", "before_training", "before_a_validation", "most_steps_lost", "most_drafts"), 0
    )
    began, startup = time.monotonic(), time_to_train()
    while figures["kills"] < kills:
        before = max(steps(run / "checkpoints"), default=0)
        child = start(run, LENGTH, tmpdir=other if figures["kills"] % 2 else Path.cwd())
        # One kill in four during startup; the others during training, however long startup takes.
        if figures["kills"] % 4:
            while max(steps(run / "checkpoints"), default=0) == before and not ended(child):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1))
        else:
            time.sleep(random.uniform(0, startup))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself: see {out / run / 'output.log'}"
        figures["kills"] += 1
        newest = newest_whole(run / "checkpoints", fail)
        saved = int(newest.name.removeprefix("step-")) if newest else 0
        trained = max(read_batches(run)[0], default=0)
        drafts = len(list((run / "checkpoints").glob(".*")))
        assert saved >= before, (saved, before)
        figures["in_a_save"] += drafts
        figures["before_training"] += saved == before
        # Saved, and its validation was due and had not ended.
        validated = any(name.startswith("val/") for step, name in values(run) if step == saved)
        figures["before_a_validation"] += saved > 0 and saved % 2 == 0 and not validated
        # The step in progress is lost; a finished step may be lost while it is being saved.
        figures["most_steps_lost"] = max(figures["most_steps_lost"], trained - saved)
        figures["most_drafts"] = max(figures["most_drafts"], drafts)
        print(f"kill {figures['kills']}/{kills}: step {saved} is saved", flush=True)
    length = max(steps(run / "checkpoints"), default=0) + 2
    for folder in (run, Path("straight")):
        _, status = os.waitpid(start(folder, length, Path.cwd()), 0)
        assert status == 0, f"{folder} failed: see {out / folder / 'output.log'}"
    batches, differing = read_batches(run)
    same = not differing and batches == read_batches(Path("straight"))[0]
    straight = Path("straight")
    last, other = (read(folder / "checkpoints" / f"step-{length}") for folder in (run, straight))
    a, b = values(run), values(straight)
    figures |= {
        "steps": length,
        "same_batches": same,
        "values": len(b),
        "values_differing": sum(a.get(place) != b.get(place) for place in a.keys() | b.keys()),
        "difference": difference(last, other) or difference(results(run), results(straight)),
        "left_over": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(figures))
    good = same and figures["difference"] is None and figures["most_steps_lost"] <= 1 and figures["most_drafts"] <= 1
    return 0 if good else 1


def values(run: Path) -> dict[tuple[int, str], str]:
    """Return (step, name) → value of the metrics of a run, without its speed."""
    rows = results(run)["metrics.csv"].items()
    return {(step, name): value for step, row in rows for name, value in row.items() if not name.startswith(SPEED)}


def time_to_train() -> float:
    """Seconds from start to the first step."""
    began = time.monotonic()
    child = start(Path("first"), LENGTH, Path.cwd())
    while not read_batches(Path("first"))[0]:
        assert not ended(child), f"the run ended by itself: see {Path('first/output.log').resolve()}"
        time.sleep(0.01)
    needed = time.monotonic() - began
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return needed


def start(run: Path, length: int, tmpdir: Path) -> int:
    """Fork a process that trains; return its id."""
    child = os.fork()
    if child:
        return child
    run.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(tmpdir)
    log = os.open(run / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Learning rates must not depend on where the run ends.
    last = [f"trainer.max_steps={length}", "optim.schedule=constant", "optim.warmup_ratio=0"]
    os._exit(cli.main(["train", *RECIPE, *last, f"run.dir={run}", f"+callbacks.batch_log.folder={run}"]))


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def fail(fault: str) -> None:
    raise AssertionError(fault)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
