"""A run's metrics, tables and images in Weights & Biases, with the CSV table beside it."""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.runs.disk import write_text
from mmlab.runs.redact import redact, redact_text
from mmlab.training.config import CSVLogConfig, WandbLogConfig
from mmlab.training.csv_log import CSVLog, values_of
from mmlab.training.wandb_files import find_segments

STEP = "trainer/global_step"
ID_FILE = "wandb_id"
DATA_DIR = "WANDB_DATA_DIR"
FLUSH_S = 0.5
PATIENCE = 3  # failures of wandb after which a run continues without it


class WandbLog(Logger):
    """Logs to wandb and to `<save_dir>/metrics.csv`; wandb's step is the number of finished optimizer steps.

    The config is that of `<save_dir>/config.yaml`, where secrets are redacted already. A resumed run keeps its id and
    starts another segment; what a killed process logged and wandb had not written yet is logged again from the table.
    The key stays in the environment (WANDB_API_KEY).

    Args:
        config: settings.
    """

    def __init__(self, config: WandbLogConfig):
        super().__init__()
        self.csv = CSVLog(CSVLogConfig(save_dir=config.save_dir))
        self.offline = config.offline is not False
        # A secret may stand anywhere on a command line.
        names = ("project", "entity", "name", "id", "group", "job_type")
        self.arguments: dict[str, Any] = {name: (text := getattr(config, name)) and redact_text(text) for name in names}
        self.arguments["tags"] = [redact_text(tag)[:64] for tag in config.tags or ()]
        self.run: Any = None
        self.failures = 0
        self._placed = False  # whether DATA_DIR is ours
        self._logged = 0  # the last step that wandb has from earlier starts
        self._behind = False  # whether rows of the table may be missing there

    @property
    def name(self) -> str | None:
        return self.arguments["project"]

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self.csv.save_dir

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config is logged as a whole."""

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Start the segment: Lightning calls this when training is about to begin."""
        self.csv.log_graph(model)
        self.start()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to a step; see `CSVLog.log_metrics`."""
        self.start()
        self.csv.log_metrics(metrics, step)
        done = self.csv.last_step
        # The first row of a segment repeats what earlier ones have of its step.
        row = values_of(self.csv.rows[done]) if self._behind else values_of(metrics)
        self.log(row, done)

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table whose cells are text, numbers or images; `step` counts finished optimizer steps."""
        import wandb

        cells: list[Any] = [
            [wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows
        ]
        self.log({name: wandb.Table(columns=list(columns), data=cells)}, step)

    @rank_zero_only
    def log_pictures(
        self, name: str, pictures: Sequence[Any], step: int, captions: Sequence[str] | None = None
    ) -> None:
        """Log PIL images or uint8 arrays `[H, W, 3]` as one panel; `step` counts finished optimizer steps."""
        import wandb

        texts = captions or [None] * len(pictures)
        self.log({name: [wandb.Image(one, caption=text) for one, text in zip(pictures, texts, strict=True)]}, step)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Pass values to wandb. If it fails, its next segment repeats the rows of the table."""
        self.start()
        if self.run is None:
            return
        try:
            if self._behind:
                self._catch_up(step)
            if self.offline or step > self._logged:  # the server keeps what it has
                self.run.log({**values, STEP: step}, step=step)
        except Exception as error:  # wandb's process may be gone, with any of its exceptions
            self._lose(error)

    def _catch_up(self, end: int) -> None:
        """Log the table's rows before the step `end` that wandb does not have."""
        self._behind = False
        for step in [step for step in self.csv.rows if self._logged < step < end]:
            self.run.log({**values_of(self.csv.rows[step]), STEP: step}, step=step)

    def start(self) -> None:
        """Begin this start's segment, once."""
        if self.run is not None or self.failures >= PATIENCE:
            return
        import wandb
        from wandb.errors import AuthenticationError, CommError, UsageError

        self.csv.open()
        if DATA_DIR not in os.environ:
            # Files of tables are kept with the run: elsewhere they might be gone when it is pushed.
            os.environ[DATA_DIR] = str(Path(self.save_dir, "wandb", "data").resolve())
            self._placed = True
        try:
            self.run = self._init(wandb)
        except (UsageError, AuthenticationError) as error:
            raise ConfigError(
                f"wandb does not start: {_line(error)}; check WANDB_API_KEY, or set logger.offline=true."
            ) from error
        except CommError as error:
            print(f"wandb cannot be reached ({_line(error)}): logging offline, `mmlab sync` pushes it", file=sys.stderr)
            self.offline = True
            _leave_wandb()  # it would reserve the id for the run that it failed to start
            self.run = self._init(wandb)
        self._logged = max(self.run.starting_step - 1, 0)
        if self.offline:
            steps = [row for segment in find_segments(self.save_dir) for row in segment.rows]
            self._logged = max(steps, default=0)
        self._behind = True
        if not self.offline:
            print(f"wandb: {self.run.url}", file=sys.stderr)

    def _init(self, wandb: Any) -> Any:
        Path(self.save_dir).mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=30,  # then offline
            # Command line, environment and code are not redacted.
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            # Otherwise the config of a killed run never reaches its file.
            x_transaction_log_flush_interval=FLUSH_S,
        )
        wandb.setup(settings=settings)  # `silent` given to `init` alone lets it advertise Weave
        id = self.arguments["id"] or run_id(Path(self.save_dir), self.arguments["name"] or "run")
        run = wandb.init(
            **{**self.arguments, "id": id},
            dir=self.save_dir,
            mode="offline" if self.offline else "online",
            resume="allow",
            config=self._config(),
            settings=settings,
        )
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        if self.offline:
            _wait_for(Path(run.settings.sync_file))
        return run

    def _config(self) -> dict[str, Any]:
        file = Path(self.save_dir, "config.yaml")
        return redact(yaml.safe_load(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the segment; another start may resume the run."""
        while not self._finished(0 if status == "success" else 1):
            if status != "success":
                break  # the next start repeats its rows
            self.start()
        if self._placed:
            os.environ.pop(DATA_DIR, None)
            self._placed = False

    def _finished(self, exit_code: int) -> bool:
        """End the segment; False if wandb failed and lacks rows."""
        if self.run is None:
            return not 0 < self.failures < PATIENCE
        try:
            if self._behind and self.csv.rows:
                self._catch_up(self.csv.last_step + 1)
            self.run.finish(exit_code=exit_code)
            self.run, self.failures = None, 0
            _leave_wandb()  # its process writes for a while after `finish`
        except Exception as error:
            self._lose(error)
            return self.failures >= PATIENCE
        return True

    def _lose(self, error: Exception) -> None:
        self.run = None
        self.failures += 1
        what = "is restarted" if self.failures < PATIENCE else "is not used any more"
        print(f"wandb stopped ({_line(error)}) and {what}; {self.csv.path} has every step", file=sys.stderr)
        with suppress(Exception):
            _leave_wandb()


def _leave_wandb() -> None:
    """End wandb's process, which writes what it has; the next segment starts a new one."""
    import wandb

    wandb.teardown()


def run_id(folder: Path, name: str) -> str:
    """The run's id, kept in its folder: wandb would continue any other run of the same id."""
    file = folder / ID_FILE
    if not file.is_file():
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:100]
        write_text(file, f"{slug}-{os.urandom(3).hex()}\n")
    return file.read_text().strip()


def _wait_for(file: Path, seconds: float = 10 * FLUSH_S) -> None:
    """Wait until the start of a segment, with its config, is on the disk."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (file.is_file() and file.stat().st_size > 100):
        time.sleep(FLUSH_S / 10)


def _line(error: Exception) -> str:
    return redact_text(" ".join(str(error).split())[:200]).rstrip(".") or type(error).__name__
