"""A stand-in for `mmlab train` that trains nothing, so that the points of a sweep take a second."""

import signal
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from mmlab.config.compose import hydra_verb
from mmlab.config.errors import RunError, UserError
from mmlab.runs.run import finish, prepare_run

RECIPE = "experiment=llava/align_tiny"


def train(cfg: DictConfig) -> None:
    """Finish with the learning rate as loss; 0.5 fails, seed 7 waits for a signal, each start writes a line."""
    start = prepare_run(cfg)
    folder = start.folder
    if start.complete:
        return
    start.open()
    with Path("started.txt").open("a") as file:
        file.write(f"{cfg.run.name} {cfg.run.sweep} {cfg.optim.lr:g}\n")
    if Path("broken").exists() and cfg.optim.lr == 0.5:
        raise RunError("The loss is not a number.")
    if cfg.seed == 7:
        print("waiting", flush=True)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda number, _: caught.append(number))
        caught: list[int] = []
        Path("waiting").write_text(cfg.run.name)
        while not caught:
            time.sleep(0.02)
        time.sleep(0.3)  # a second signal would arrive in this time
        Path("saved").write_text(" ".join(map(str, caught)))
        sys.exit(128 + caught[0])
    if Path("unnamed").exists():
        finish(folder, {"steps": 2, "val/loss": 1.0})
        return
    finish(folder, {"steps": 2, "train/loss": float(cfg.optim.lr), "val/loss": 1.0})


if __name__ == "__main__":
    try:
        sys.exit(hydra_verb("train", train, sys.argv[1:]))
    except UserError as error:
        print(f"mmlab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
