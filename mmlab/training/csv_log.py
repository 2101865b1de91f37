"""A run's metrics as one table: a row per logged optimizer step, however often the run was resumed."""

import csv
import io
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from mmlab.runs.disk import write_text, writing, writing_later
from mmlab.runs.metrics_table import FILE_NAME, STEP, read_table
from mmlab.training.config import CSVLogConfig


class CSVLog(Logger):
    """Writes `<save_dir>/metrics.csv`, at once: the column `step` counts finished optimizer steps.

    What is logged at one step is one row. A resumed run continues its table: rows of steps that are trained again are
    replaced, so each step is there once. The row of the step that it resumes from keeps its values.

    Args:
        config: settings.
    """

    def __init__(self, config: CSVLogConfig):
        super().__init__()
        self.path = Path(config.save_dir, FILE_NAME)
        self.columns: list[str] = [STEP]
        self.rows: dict[int, dict[str, Any]] = {}
        self._module: LightningModule | None = None
        self._opened = False
        self._behind = False  # the disk was full, and the file lacks rows
        self._last_at = 0  # where the last row begins in the file

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config lies beside the table."""

    def log_graph(self, model: LightningModule, input_array: Any = None) -> None:
        """Keep the module: Lightning calls this when training is about to begin."""
        self._module = model

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to a step's row.

        Args:
            metrics: numbers by name.
            step: Lightning's count, for callers without a trainer. It is one behind, and differs after some restarts.
        """
        if self._module is not None:
            loop: Any = self._module.trainer.fit_loop
            done = self._module.trainer.global_step
            # The validation of the step that a run resumes from is repeated, maybe with other settings.
            keep = done == loop.began_at
        else:
            done, keep = self.last_step if step is None else step + 1, False
        self.add(values_of(metrics), done, keep)

    def add(self, values: Mapping[str, Any], step: int, keep: bool = False) -> None:
        """Add values to the row of `step`, which counts from 1; later rows are from before an interruption.

        Args:
            values: numbers by name.
            step: finished optimizer steps.
            keep: whether values that the row has already stay.
        """
        if not values:
            return
        self.open()
        if keep:
            values = {**values, **self.rows.get(step, {})}
        ahead = [later for later in self.rows if later > step]
        for later in ahead:
            del self.rows[later]
        new = sorted(values.keys() - set(self.columns))
        self.columns += new
        append = bool(self.rows) and self.last_step < step
        self.rows.setdefault(step, {}).update(values)
        rewrite = bool(ahead or new or self._behind or not self.path.exists())
        self._behind = True
        with writing_later(self.path):
            if rewrite:
                self._write_all()
            else:
                self._write_last(append)
            self._behind = False

    @property
    def last_step(self) -> int:
        """Step of the last row, 0 without any."""
        return next(reversed(self.rows), 0)

    def open(self) -> None:
        """Read the table of an earlier start, once."""
        if not self._opened:
            self._opened = True
            self.rows = dict(sorted(read_table(self.path, self._keep_damaged).items()))  # the last one is the newest
            names = dict.fromkeys(name for row in self.rows.values() for name in row)
            self.columns += names
            if self.rows:
                self._write_all()  # without the incomplete line of a killed process

    def _keep_damaged(self, fault: str) -> None:
        kept = self.path.with_name(f"{self.path.name}.damaged")
        with writing(kept):
            shutil.copyfile(self.path, kept)
        print(f"WARNING: {self.path} is damaged: {fault}; as it was, it is kept in {kept}.", file=sys.stderr)

    def _write_all(self) -> None:
        lines = [self._line({name: name for name in self.columns}), *map(self._line_of, self.rows)]
        self._last_at = sum(map(len, lines[:-1]))
        write_text(self.path, b"".join(lines))

    def _write_last(self, append: bool) -> None:
        with writing(self.path), self.path.open("r+b") as file:
            if append:
                self._last_at = file.seek(0, io.SEEK_END)
            else:
                file.seek(self._last_at)
                file.truncate()
            file.write(self._line_of(self.last_step))

    def _line_of(self, step: int) -> bytes:
        return self._line({STEP: step, **self.rows[step]})

    def _line(self, row: Mapping[str, Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        return text.getvalue().encode()


def values_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics without Lightning's epoch: one of its epochs spans a run, so it is always 0."""
    return {name: float(value) for name, value in metrics.items() if name != "epoch"}
