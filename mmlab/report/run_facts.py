"""What a run's folder tells about it, as plain data for a page; a damaged file is named there and stops nothing."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmlab.data.subsets import evenly_spaced
from mmlab.runs.finished_runs import DONE, FAILED, OVERRIDES, recipe_of
from mmlab.runs.metrics_table import FILE_NAME, read_table
from mmlab.runs.run_status import status_of

Curve = tuple[np.ndarray, np.ndarray]
"""Steps `[N]` int32 and values `[N]` float32."""
Table = list[list[str]]
"""Rows of cells; the first one is the head."""
Tabulate = Callable[[dict[str, Any]], tuple[Table, dict[str, str]]]
"""Scores as JSON → their table, and the main number and its baselines by name, as texts."""

_EXAMPLES = 12  # predictions shown of each evaluation
_LONGEST = 400  # characters of a text from the data


@dataclass(frozen=True)
class Evaluation:
    """Scores of a run, such as those in `eval/test`.

    Attributes:
        name: of its folder.
        table: the scores.
        main: the metric, the main number and its baselines, by name; empty for scores of pictures.
        examples: predictions, wrong ones first, as texts by the name of their column.
        left_out: number of predictions that are not among the examples.
        sheets: files of pictures.
    """

    name: str
    table: Table
    main: dict[str, str]
    examples: list[dict[str, str]]
    left_out: int
    sheets: list[Path]


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        folder: of the run.
        status: one of `mmlab.runs.run_status.STATUS`.
        error: why it failed, or None.
        config: its resolved config.
        overrides: its command line, without the recipe.
        done: its last metrics, if it is finished.
        code: the states of the code that trained it, in order of time.
        data: its data report.
        faults: sentences about files that could not be read.
    """

    folder: Path
    status: str
    error: str | None
    config: dict[str, Any]
    overrides: list[str]
    done: dict[str, Any]
    code: list[dict[str, Any]]
    data: dict[str, Any]
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> str | None:
        return recipe_of(self.folder)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Every column of `metrics.csv` by its name."""
        columns: dict[str, tuple[list[int], list[str]]] = {}
        for step, row in sorted(read_table(self.folder / FILE_NAME, self.faults.append).items()):
            for name, text in row.items():
                steps, texts = columns.setdefault(name, ([], []))
                steps.append(step)
                texts.append(text)
        return {
            name: (np.array(steps, np.int32), np.array(texts).astype(np.float32))
            for name, (steps, texts) in sorted(columns.items())
        }

    @property
    def steps(self) -> int:
        """Optimizer steps so far, as far as they are logged."""
        if isinstance(done := self.done.get("steps"), int):
            return done
        return max((int(steps[-1]) for steps, _ in self.curves.values()), default=0)

    @property
    def end(self) -> str:
        """The length that the config asks for, such as `1,400 steps`."""
        steps, epochs = (self.settings.get(f"trainer.{name}") for name in ("max_steps", "max_epochs"))
        return f"{steps:,} steps" if isinstance(steps, int) and steps > 0 else f"{epochs} epochs" if epochs else ""

    @property
    def last(self) -> dict[str, float]:
        """The last losses and validation metrics."""
        values = self.done or {name: float(values[-1]) for name, (_, values) in self.curves.items()}
        found = {name: value for name, value in values.items() if name.startswith(("train/loss", "val/"))}
        return {name: value for name, value in found.items() if isinstance(value, int | float)}

    @property
    def starts(self) -> list[str]:
        """The times of its starts."""
        return [str(time) for state in self.code for time in state.get("starts") or []]

    @property
    def changed(self) -> str:
        """When it was last written to."""
        files = [self.folder / name for name in (FILE_NAME, DONE, FAILED, "config.yaml")]
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(max(f.stat().st_mtime for f in files if f.is_file())))

    @property
    def commit(self) -> str:
        """The last commit that trained it, with a `+` if there were changes."""
        last = self.code[-1] if self.code else {}
        changed = last.get("diff") or last.get("new_files")
        return f"{str(last['commit'])[:10]}{'+' * bool(changed)}" if last.get("commit") else ""

    @property
    def settings(self) -> dict[str, Any]:
        """The leaves of the config by their dotted keys."""
        return dict(_leaves(self.config, ""))

    @property
    def sheets(self) -> dict[int, Path]:
        """Step → the sheet of validation samples."""
        files = self.folder.glob("samples/step-*.png")
        return dict(sorted((int(number), file) for file in files if (number := file.stem[5:]).isdecimal()))

    @property
    def stored(self) -> list[tuple[str, str]]:
        """Checkpoints and artifacts with their sizes."""
        kinds = [sorted(self.folder.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name))]
        kinds.append(sorted(path for path in self.folder.glob("artifacts/*") if path.is_dir()))
        return [(str(path.relative_to(self.folder)), _size(path)) for paths in kinds for path in paths]

    def evaluations(self, tabulate: Tabulate) -> list[Evaluation]:
        """The scores in the run's folder.

        Args:
            tabulate: makes the table of scores of answers; other scores become rows of name and number.
        """
        return [
            _evaluation(path.parent, scores, tabulate, self.faults)
            for path in sorted(self.folder.glob("eval/**/scores.json"))
            if (scores := _json(path, self.faults, dict))
        ]


def read_run(folder: Path) -> RunFacts:
    """Read a run's folder; any of its files may be missing."""
    faults: list[str] = []
    return RunFacts(
        folder,
        status_of(folder),
        _json(folder / FAILED, faults, dict).get("error"),
        _config(folder / "config.yaml", faults),
        [line for line in _lines(folder / OVERRIDES) if not line.lstrip("+").startswith("experiment=")],
        _json(folder / DONE, faults, dict),
        [state for state in _json(folder / "code.json", faults, list) if isinstance(state, dict)],
        _json(folder / "data_report.json", faults, dict),
        faults,
    )


def differing(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Config keys whose values differ between runs, with the value of each run; not names and places of the runs."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for leaves in settings for key in leaves if not key.startswith("run."))
    found = {}
    for key in keys:
        values = [str(leaves.get(key, "–")) for leaves in settings]
        pairs = list(zip(runs, values, strict=True))
        places = all(value.startswith(str(run.settings.get("run.dir", run.folder))) for run, value in pairs)
        names = key.endswith(".name") and all(value == run.name for run, value in pairs)
        if len(set(values)) > 1 and not places and not names:
            found[key] = values
    return found


def thinned(sheets: dict[int, Path], count: int) -> dict[int, Path]:
    """At most `count` sheets, of which there are at least two, from the first to the last one."""
    steps = list(sheets)
    return {step: sheets[step] for step in (steps[n] for n in evenly_spaced(len(steps), count))}


def _evaluation(folder: Path, scores: dict[str, Any], tabulate: Tabulate, faults: list[str]) -> Evaluation:
    table, main = _numbers(scores), {}
    if "types" in scores and "questions" in scores:
        try:
            table, main = tabulate(scores)
        except (KeyError, TypeError, AttributeError, ValueError):
            faults.append(f"{folder / 'scores.json'} has another layout than this version writes")
    rows = []
    for line in _lines(folder / "predictions.jsonl"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    rows = [row for row in rows if isinstance(row, dict) and "prediction" in row]
    wrong, right = ([row for row in rows if bool(row.get("right")) is one] for one in (False, True))
    some = [group[n] for group in (wrong, right) for n in evenly_spaced(len(group), _EXAMPLES // 2)]
    names = ("key", "type", "question", "answer", "prediction", "blind", "right")
    examples = [{name: shortened(row[name]) for name in names if name in row} for row in some]
    name = str(folder.relative_to(next(parent for parent in folder.parents if parent.name == "eval")))
    return Evaluation(name, table, main, examples, len(rows) - len(some), sorted(folder.glob("*.png")))


def shortened(value: Any) -> str:
    """A value as a text of limited length; yes and no for truth values."""
    text = {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _numbers(scores: dict[str, Any]) -> Table:
    """The numbers and short texts among scores, as rows of name and value."""
    leaves = ((key, value) for key, value in _leaves(scores, "") if value not in ([], {}))
    rows = [[key, f"{value:.5g}" if isinstance(value, float) else shortened(value)] for key, value in leaves]
    return [["score", "value"], *rows]


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}".lstrip("."))
    else:
        yield where, node


def _json(path: Path, faults: list[str], kind: type) -> Any:
    """A dict or list from a file of JSON; an empty one without the file, or if the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, kind):
            raise ValueError(f"it holds no {kind.__name__}")
    except FileNotFoundError:
        return kind()
    except (OSError, ValueError) as error:
        faults.append(f"{path} cannot be read: {error}")
        return kind()
    return content


def _config(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(config, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        faults.append(f"{path} cannot be read: {' '.join(str(error).split())}")
        return {}
    return config


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _size(folder: Path) -> str:
    size = float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
