"""Contests: the same work done by several programs, each run in a process of its own, in turn.

A contest is a module with `CONTEST = Contest(...)`, which ends with `main(CONTEST)`:

    python benchmarks/<module>.py [ROUNDS]

`python benchmarks/all_contests.py` (`make bench`) runs all of them and writes `benchmarks/results.json`. With
`CONTEST=tiny` in the environment the work takes a few seconds: it tells whether the contests run, not who is faster.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Outcome:
    """What a side has done.

    Attributes:
        amount: of the work in the measured time, in the contest's unit (samples, pictures, 1 for a start).
        seconds: elapsed during the measured time, which excludes the first steps; None measures the whole process.
        losses: of all steps, which must agree between the sides.
    """

    amount: float
    seconds: float | None = None
    losses: list[float] = field(default_factory=list)


Side = Callable[[Path], Outcome]


def tiny() -> bool:
    """Whether the work is to be as small as possible."""
    return os.environ.get("CONTEST") == "tiny"


@dataclass
class Contest:
    """Programs that do the same work.

    Attributes:
        title: of the table.
        unit: of `Outcome.amount`, in the plural.
        sides: by name; the first one is the baseline. Each is called with the folder that `prepare` has filled.
        goals: ratios to the baseline that are aimed for, by side.
        prepare: writes the data and weights that all sides share.
        tolerance: by which the losses of a step may differ from the baseline's.
    """

    title: str
    unit: str
    sides: dict[str, Side]
    prepare: Callable[[Path], None]
    goals: dict[str, float] = field(default_factory=dict)
    tolerance: float = 1e-3


@dataclass
class _Reading:
    amount: float
    seconds: float
    elapsed: float
    cpu: float
    peak: int
    losses: list[float]


def measure(contest: Contest, script: str, rounds: int) -> dict[str, Any]:
    """Run all sides in turn, `rounds` times, and print the medians.

    A ratio compares what is done per second after the first steps, `whole_run_ratio` the time of the processes, and
    `cpu_ratio` their CPU time per unit.

    Returns:
        The figures of each side, for JSON.

    Raises:
        ValueError: the losses of two sides differ.
    """
    readings: dict[str, list[_Reading]] = {side: [] for side in contest.sides}
    with tempfile.TemporaryDirectory() as base:
        contest.prepare(Path(base))
        for _ in range(rounds):
            for side in contest.sides:
                readings[side].append(_child(script, side, base))
    sides = {side: _medians(each) for side, each in readings.items()}
    first, *others = contest.sides
    for side, figures in sides.items():
        figures["ratio"] = figures["rate"] / sides[first]["rate"]
        figures["whole_run_ratio"] = sides[first]["whole_run_s"] / figures["whole_run_s"]
        figures["cpu_ratio"] = sides[first]["cpu_per_unit"] / figures["cpu_per_unit"]
        if side in contest.goals:
            figures["goal"] = contest.goals[side]
    _print(contest, sides)
    for side in others:
        for step, (a, b) in enumerate(zip(readings[first][0].losses, readings[side][0].losses, strict=True)):
            if abs(a - b) > contest.tolerance:
                raise ValueError(f"The losses of step {step} differ: {a:.6f} by {first}, {b:.6f} by {side}.")
    return {"title": contest.title, "unit": contest.unit, "baseline": first, "rounds": rounds, "sides": sides}


def _child(script: str, side: str, folder: str) -> _Reading:
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, script, "side", side, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"'{side}' of {script} ended with exit code {child.returncode}.")
    elapsed = time.perf_counter() - start
    outcome = Outcome(**json.loads(output.splitlines()[-1]))
    seconds = elapsed if outcome.seconds is None else outcome.seconds
    cpu = usage.ru_utime + usage.ru_stime  # with those of its workers that it has waited for
    return _Reading(outcome.amount, seconds, elapsed, cpu, usage.ru_maxrss * 1024, outcome.losses)


def _medians(readings: list[_Reading]) -> dict[str, Any]:
    rates = sorted(each.amount / each.seconds for each in readings)
    return {
        "rate": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "cpu_per_unit": statistics.median(each.cpu / each.amount for each in readings),
        "whole_run_s": statistics.median(each.elapsed for each in readings),
        "peak_gb": statistics.median(each.peak for each in readings) / 1e9,
        "losses": readings[0].losses,
    }


def _print(contest: Contest, sides: dict[str, dict[str, Any]]) -> None:
    width = max(len(contest.title), *map(len, sides)) + 1
    print(
        f"\n{contest.title:<{width}} {contest.unit + '/s':>12} {'range':>15} {'ratio':>7} {'goal':>6} {'whole run':>18}"
        f" {'CPU':>7} {'memory':>8}  losses"
    )
    for side, f in sides.items():
        spread, goal = f"{f['lowest']:.4g}–{f['highest']:.4g}", f.get("goal")
        losses = f"{f['losses'][0]:.5f} → {f['losses'][-1]:.5f}" if f["losses"] else ""
        print(
            f"{side:<{width}} {f['rate']:>12.4g} {spread:>15} {f['ratio']:>6.2f}x {f'{goal:g}x' if goal else '':>6}"
            f" {f['whole_run_s']:>8.1f} s {f['whole_run_ratio']:>6.2f}x {f['cpu_ratio']:>6.2f}x"
            f" {f['peak_gb']:>5.2f} GB  {losses}",
            flush=True,
        )


def main(contest: Contest) -> None:
    """Command line of a contest: `[ROUNDS]`, or `side NAME FOLDER` in the processes that `measure` starts."""
    if sys.argv[1:2] == ["side"]:
        outcome = contest.sides[sys.argv[2]](Path(sys.argv[3]))
        print("\n" + json.dumps(asdict(outcome), allow_nan=False), flush=True)
        return
    measure(contest, sys.argv[0], int(sys.argv[1]) if len(sys.argv) > 1 else 5)
