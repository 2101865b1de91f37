"""SIGKILL a run that checkpoints every step and validates every other one: kill_matrix.py OUT [KILLS [START …]].

A START is a strategy and a number of ranks, such as fsdp:2; the starts of the run take them in turn. Each rank of a
start is a fork of this process, with all imports done. One process (auto:1, the default) is killed after random times.
Ranks are killed as `MOMENTS` says: all of them, or one, after which the others must end by themselves. After each kill
the newest checkpoint must be complete and at most one step behind, and at most one partial checkpoint may be left. At
the end the run must be bitwise equal to an uninterrupted run, with all its metrics. Where the starts differ, numbers
are summed in another order: then every step must have the same batch, and losses must be equal to the rounding of
float32. The last line is one JSON object.
"""

import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers.models.llama.modeling_llama
import transformers.models.siglip.modeling_siglip  # noqa: F401  imported before the forks, which then start fast

import mmlab.data.module
import mmlab.model.language
import mmlab.stage.contrastive
import mmlab.stage.next_token
import mmlab.training.ema
import mmlab.training.trainer  # noqa: F401
from mmlab import cli
from mmlab.training.checkpoint_folder import newest_whole, steps
from mmlab.training.checkpoint_io import read
from mmlab.training.resume_proof import SPEED, BatchLog, difference, read_batches, results

COMMON = [
    "data.micro_batch=2",
    "data.workers=0",
    "data.val=[{path:train,name:val}]",
    "trainer=cpu",
    "trainer.val_every=2",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "callbacks.checkpoint.every_n_steps=1",
    "+callbacks.batch_log._target_=mmlab.training.resume_proof.BatchLog",
]
ONE_PROCESS = [
    "experiment=llava/vision_tiny",
    "model/vision=siglip_tiny",
    "model.vision.architecture.num_hidden_layers=1",
    "data.global_batch=4",
]
RANKS = [  # two micro-batches a step on two ranks, tied weights, clipping and averages
    "experiment=llava/language_tiny",
    "data.global_batch=8",
    "data.max_length=128",
    "data.pack=false",
    "model.language.architecture.num_hidden_layers=2",
    "callbacks.samples=null",
    "+callbacks.ema._target_=mmlab.training.ema.EMA",
    "+callbacks.ema.decay=0.9",
]
DROPOUT = ["+model.language.architecture.attention_dropout=0.1"]  # each rank draws its own numbers

# Never reached: kills end the run, and the last start trains two steps beyond the newest checkpoint.
LENGTH = 1_000_000
# When ranks are killed: in these files half is written, `rename` comes after it.
FILES = {
    "shard": r"/\.draft-\w+/shard-[^/]*",
    "state": r"/\.draft-\w+/state\.pt",
    "manifest": r"/\.draft-\w+/manifest\.json",
    "rename": "/checkpoints",
    "end": r"/\.draft-[^/]*(artifacts|language|done).*",
}
MOMENTS = [
    ("startup", "all"),
    ("training", "all"),
    ("training", "one"),
    ("shard", "one"),
    ("state", "one"),
    ("manifest", "one"),
    ("manifest", "all"),
    ("rename", "one"),
    ("validation", "all"),
    ("validation", "one"),
    ("end", "all"),
    ("end", "one"),
]
PATIENCE = 120  # seconds in which the other ranks must have ended
ROUNDING = 1e-5  # largest relative difference of a loss


def main(out: Path, kills: int, kinds: Sequence[str]) -> int:
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    other = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    cli.main(["shards", "build", "shapes", "data/shapes/train", "--count", "64", "--overwrite"])
    cli.main(["shards", "tokenizer", "data/shapes/train", "--out", "data/shapes/tokenizer", "--vocab-size", "320"])
    random.seed(0)
    matrix = Matrix(Path("killed"), kinds or ("auto:1",))
    began, startup = time.monotonic(), matrix.time_to_train()
    for number in range(kills):
        what = matrix.kill(number, startup, other if number % 2 else Path.cwd())
        print(f"kill {number + 1}/{kills}: {what}", flush=True)
    figures = {**matrix.figures, **matrix.compare(kills), "minutes": round((time.monotonic() - began) / 60, 1)}
    print(json.dumps(figures))
    good = figures["same_batches"] and figures["most_steps_lost"] <= 1 and figures["most_drafts"] <= 1
    return 0 if good and figures.get("difference") is None and figures.get("loss_error", 0) < ROUNDING else 1


class Matrix:
    """A run that is killed.

    Args:
        run: its folder.
        kinds: strategy and number of ranks of its starts, which take them in turn.
    """

    def __init__(self, run: Path, kinds: Sequence[str]):
        self.run, self.kinds = run, [(kind.split(":")[0], int(kind.split(":")[1])) for kind in kinds]
        self.same = len(set(kinds)) == 1
        self.recipe = ONE_PROCESS if set(kinds) == {"auto:1"} else [*RANKS, *(DROPOUT if self.same else ())]
        self.figures: dict[str, Any] = dict.fromkeys(
            ("kills", "in_a_save", "before_training", "before_a_validation", "most_steps_lost", "most_drafts"), 0
        )

    @property
    def saved(self) -> int:
        return max(steps(self.run / "checkpoints"), default=0)

    def start(self, run: Path, number: int, length: int, tmpdir: Path = Path(), **kill: str) -> "Start":
        kind = self.kinds[number % len(self.kinds)]
        return Start(run, number, length, kind, self.recipe, tmpdir.resolve(), **kill)

    def time_to_train(self) -> float:
        """Seconds from start to the first step."""
        began = time.monotonic()
        first = self.start(Path("first"), 0, LENGTH)
        while not read_batches(first.log)[0]:
            first.check()
            time.sleep(0.01)
        needed = time.monotonic() - began
        first.kill("all")
        first.wait()
        return needed

    def kill(self, number: int, startup: float, tmpdir: Path) -> str:
        """Start the run, kill it and check what is left; returns a description."""
        before, (strategy, ranks) = self.saved, self.kinds[number % len(self.kinds)]
        # Of a single process, one kill in four is during startup.
        moment, who = MOMENTS[number % len(MOMENTS)] if ranks > 1 else ("training" if number % 4 else "startup", "all")
        moment = "state" if moment == "shard" and strategy != "fsdp" else moment
        # A validation is due at an even step in any case.
        length = before + 2 + before % 2 if moment == "end" else LENGTH
        start = self.start(self.run, number, length, tmpdir, moment=moment, who=who)
        if moment == "startup":
            time.sleep(random.uniform(0, startup))
        elif moment == "training":  # however long startup takes
            while self.saved == before:
                start.check()
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1))
        if moment in ("startup", "training"):
            start.kill(who)
        waited = start.wait()
        self.count(start, before, waited)
        return f"{strategy}:{ranks}, {moment}, {who}; the others ended after {waited:.1f} s; step {self.saved} is saved"

    def count(self, start: "Start", before: int, waited: float) -> None:
        newest = newest_whole(self.run / "checkpoints", fail)
        saved = int(newest.name.removeprefix("step-")) if newest else 0
        trained = max(read_batches(start.log)[0], default=0)
        drafts = len(list((self.run / "checkpoints").glob(".*")))
        assert saved >= before, (saved, before)
        # Saved, and its validation was due and had not ended.
        validated = any(name.startswith("val/") for step, name in values(self.run) if step == saved)
        figures = self.figures
        figures["kills"] += 1
        figures["in_a_save"] += drafts
        figures["before_training"] += saved == before
        figures["before_a_validation"] += saved > 0 and saved % 2 == 0 and not validated
        # The step in progress is lost; a finished step may be lost while it is being saved.
        figures["most_steps_lost"] = max(figures["most_steps_lost"], trained - saved)
        figures["most_drafts"] = max(figures["most_drafts"], drafts)
        if len(start.pids) > 1:
            figures.setdefault("moments", Counter())[f"{start.moment}, {start.who}"] += 1
            figures["seconds_until_all_ended"] = max(figures.get("seconds_until_all_ended", 0.0), round(waited, 1))

    def compare(self, kills: int) -> dict[str, Any]:
        """Finish the run, train an uninterrupted one as its first start did, and compare them."""
        length, straight = self.saved + 2, Path("straight")
        for number, folder in ((kills, self.run), (0, straight)):
            self.start(folder, number, length).finish()
        batches = read_batches(straight / "starts" / "0")[0]
        figures: dict[str, Any] = {"steps": length, "same_batches": same_batches(self.run, batches)}
        a, b = values(self.run), values(straight)
        last, other = (read(folder / "checkpoints" / f"step-{length}") for folder in (self.run, straight))
        if self.same:
            figures["values"], places = len(b), a.keys() | b.keys()
            figures["values_differing"] = sum(a.get(place) != b.get(place) for place in places)
            figures["difference"] = difference(last, other) or difference(results(self.run), results(straight))
        else:
            losses = [place for place in b if place[1].endswith("/loss")]
            figures["losses"] = len(losses)
            figures["loss_error"] = max(abs(float(a[place]) / float(b[place]) - 1) for place in losses)
            weights = ((last["state_dict"][name], weight) for name, weight in other["state_dict"].items())
            figures["weight_error"] = max(float((one - two).abs().max()) for one, two in weights)
        return figures | {"left_over": sorted(path.name for path in (self.run / "checkpoints").iterdir())}


def same_batches(run: Path, batches: dict[int, list[str]]) -> bool:
    """Whether every step was trained on its batch in every start; a killed start may end within a step."""
    trained = set()
    for folder in (run / "starts").iterdir():
        for step, keys in (mine := read_batches(folder)[0]).items():
            whole = len(keys) == len(batches[step])
            if not (keys == batches[step] if whole else step == max(mine) and set(keys) <= set(batches[step])):
                return False
            trained |= {step} if whole else set()
    return trained == batches.keys()


def values(run: Path) -> dict[tuple[int, str], str]:
    """Return (step, name) → value of the metrics of a run, without its speed."""
    rows = results(run)["metrics.csv"].items()
    return {(step, name): value for step, row in rows for name, value in row.items() if not name.startswith(SPEED)}


@dataclass
class Start:
    """Forked ranks that train until step `length`; `who` of them, `all` or `one`, are killed at `moment`."""

    run: Path
    number: int
    length: int
    kind: tuple[str, int]
    recipe: Sequence[str]
    tmpdir: Path
    moment: str = ""
    who: str = "all"

    def __post_init__(self) -> None:
        self.log = self.run / "starts" / str(self.number)
        self.log.mkdir(parents=True, exist_ok=True)
        strategy, ranks = self.kind
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.victim, passes = random.randrange(ranks), random.randint(1, 3)
        self.pids: list[int] = []
        for rank in range(ranks):
            if child := os.fork():
                os.setpgid(child, self.pids[0] if self.pids else child)
                self.pids.append(child)
                continue
            os.environ["TMPDIR"] = str(self.tmpdir)
            if strategy != "auto":  # as Lightning starts ranks, but without importing everything again
                env = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                env |= {"MMLAB_FIRST_RANK": ""}  # the first rank of another run may be in the environment
                os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in env.items()}}
            os._exit(self._train(rank, passes))

    def _train(self, rank: int, passes: int) -> int:
        log = os.open(self.run / f"output-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.moment == "validation" and rank == self.victim:
            die_in_validation(self.who, passes * 3)
        elif self.moment in FILES and rank in (0, self.victim):  # only the first rank writes most files
            die_while_writing(FILES[self.moment], self.who, passes)
        strategy, ranks = self.kind
        # Learning rates must not depend on where the run ends.
        last = [f"trainer.max_steps={self.length}", "optim.schedule=constant", "optim.warmup_ratio=0"]
        where = [f"run.dir={self.run}", f"+callbacks.batch_log.folder={self.log}"]
        hardware = [f"trainer.strategy={strategy}", f"trainer.devices={ranks}"]
        try:
            return cli.main(["train", *COMMON, *self.recipe, *last, *hardware, *where])
        except BaseException:
            traceback.print_exc()
            return 1

    def check(self) -> None:
        """Fail if a rank has ended."""
        ended = [pid for pid in self.pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)]
        if ended:
            self.kill("all")  # the other ranks would wait for it
            logs = "\n".join(log.read_text()[-2000:] for log in sorted(self.run.glob("output-*.log")))
            raise AssertionError(f"the run ended by itself, see {self.run.resolve()}:\n{logs}")

    def kill(self, who: str) -> None:
        if who == "all":
            os.killpg(self.pids[0], signal.SIGKILL)
        else:
            os.kill(self.pids[self.victim], signal.SIGKILL)

    def wait(self) -> float:
        """Wait until all have ended, one of them killed; returns how long it took from then on."""
        codes: dict[int, int] = {}
        began: float | None = None
        started = time.monotonic()
        while len(codes) < len(self.pids):
            for pid in self.pids:
                if pid not in codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    if codes[pid] == -signal.SIGKILL and began is None:
                        began = time.monotonic()
            if began and time.monotonic() - began > PATIENCE:
                os.killpg(self.pids[0], signal.SIGKILL)
                fail(f"after one rank was killed, another went on for {PATIENCE} s: see {self.run.resolve()}")
            assert time.monotonic() - started < 600, f"no rank was killed: see {self.run.resolve()}/output-*.log"
            time.sleep(0.01)
        assert began is not None, f"the run ended by itself: see {self.run.resolve()}/output-*.log"
        # At the end of a run, the other ranks may be done.
        assert self.moment == "end" or all(codes.values()), f"exit codes {codes}"
        return time.monotonic() - began

    def finish(self) -> None:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]
        assert not any(codes), f"{self.run} failed: see {self.run.resolve()}/output-*.log"


def die(who: str) -> None:
    if who == "all":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_validation(who: str, batches: int) -> None:
    """Have this process killed after a number of batches of validation."""
    left = iter(range(batches))

    def on_validation_batch_start(*_: Any) -> None:
        if next(left, None) is None:
            die(who)

    BatchLog.on_validation_batch_start = on_validation_batch_start  # type: ignore[method-assign]


def die_while_writing(pattern: str, who: str, times: int) -> None:
    """Have this process killed when half of a file whose path ends like the pattern is on the disk."""
    sync, left = os.fsync, iter(range(times - 1))

    def fsync(number: int) -> None:
        path = Path(f"/proc/self/fd/{number}").resolve()
        if re.search(f"{pattern}$", str(path)) and next(left, None) is None:
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            die(who)
        sync(number)

    os.fsync = fsync


def fail(fault: str) -> None:
    raise AssertionError(fault)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2] if sys.argv[2:] else 100), sys.argv[3:]))
