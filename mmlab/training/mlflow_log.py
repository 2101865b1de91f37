"""A run's metrics, config, tables and images in MLflow, with the CSV table beside it."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.runs.disk import write_text
from mmlab.runs.redact import redact, redact_text
from mmlab.training.config import CSVLogConfig, MLflowLogConfig
from mmlab.training.csv_log import CSVLog, values_of

ID_FILE = "mlflow_id"
URI = os.environ.get("MLFLOW_TRACKING_URI")  # read once: mlflow sets the variable
PATIENCE = 3  # failures of MLflow after which a run continues without it until it ends


class MLflowLog(MLFlowLogger):
    """Logs to MLflow and to `<save_dir>/metrics.csv`; MLflow's step is the number of finished optimizer steps.

    Without a tracking URI, all runs of a folder share the database `mlruns/mlflow.db` in it. A resumed run keeps its
    MLflow run. MLflow cannot remove values, so those that it has of a step stay when the step is trained again; those
    that it lacks, because the process was killed or the server was away, are logged from the table.

    Args:
        config: settings.

    Raises:
        ConfigError: mlflow is not installed, or does not take the tracking URI.
    """

    def __init__(self, config: MLflowLogConfig):
        if find_spec("mlflow") is None:
            raise ConfigError("logger=mlflow needs a package: pip install 'mmlab[mlflow]'.")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # a new database is no news
        # Training waits for MLflow: about half a minute for a server that refuses, not four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
        from mlflow.tracking.context.registry import resolve_tags

        self.csv = CSVLog(CSVLogConfig(save_dir=config.save_dir))
        self._id_file = Path(config.save_dir, ID_FILE)
        local = Path(config.save_dir).resolve().parent / "mlruns"
        uri = config.tracking_uri or URI
        try:
            super().__init__(
                redact_text(config.experiment),
                run_name=redact_text(config.name),
                tags=redact(resolve_tags()),  # the address of a git remote may have a password in it
                tracking_uri=uri or f"sqlite:///{local}/mlflow.db",
                artifact_location=None if uri else local.as_uri(),
            )
            self._run_id = self._known_run()  # Lightning's setup creates one without an id
        except Exception as error:
            raise _not_started(error) from error
        self._logged: dict[str, int] = {}  # name of a metric → the last step that MLflow has of it
        self._lost = True  # not started, or MLflow has failed
        self._failures = 0

    @property
    def name(self) -> str:
        return self._experiment_name

    @property
    def version(self) -> str:
        """Empty: Lightning's would create the run before it is known whether there is one."""
        return ""

    @property
    def save_dir(self) -> str:
        return self.csv.save_dir

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config is logged as a whole."""

    @property
    def experiment(self) -> Any:
        """MLflow's client, with the run there; Lightning's setup asks for it before training.

        Raises:
            ConfigError: the server cannot be used.
        """
        try:
            return super().experiment
        except Exception as error:
            raise _not_started(error) from error

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Log the config, and what an earlier start could not: Lightning calls this when training is about to begin."""
        self.csv.log_graph(model)
        self._attempt()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to a step; see `CSVLog.log_metrics`."""
        self.csv.log_metrics(metrics, step)
        self._attempt(lambda: self._log_rows({self.csv.last_step: metrics}))

    @rank_zero_only
    def log_pictures(self, name: str, pictures: Sequence[Any], step: int) -> None:
        """Log PIL images or uint8 arrays `[H, W, 3]`, each as an image of its own with a slider over the steps."""

        def log() -> None:
            for n, picture in enumerate(pictures):
                key = name if len(pictures) == 1 else f"{name}/{n}"
                if not self._has("images", f"{key.replace('/', '~')}+step+{step}+"):
                    self.experiment.log_image(str(self.run_id), picture, key=key, step=step)

        self._attempt(log)

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table whose cells are text, numbers or images, as `<name>/step-<step>.json`."""

        def log() -> None:
            if self._has(name, f"step-{step}.json"):
                return  # another one would be appended
            table = {column: list(cells) for column, *cells in zip(columns, *rows, strict=True)}
            for cells in table.values():
                if any(isinstance(cell, Image.Image) for cell in cells):  # then MLflow takes nothing else
                    cells[:] = [Image.new("RGB", (1, 1)) if cell is None else cell for cell in cells]
            self.experiment.log_table(str(self.run_id), table, f"{name}/step-{step}.json")

        self._attempt(log)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the MLflow run, which another start may continue."""
        if self._initialized:
            self._failures = min(self._failures, PATIENCE - 1)  # one more attempt: the server may be back
            self._attempt(lambda: super(MLflowLog, self).finalize(status))

    def _attempt(self, log: Callable[[], None] = lambda: None) -> None:
        """Log something, and before it what MLflow lacks of the table, after a start or a failure."""
        if self._failures >= PATIENCE:
            return
        try:
            if self._lost:
                self._start()
            log()
            self._failures = 0
        except Exception as error:  # of the server, the network or the database
            self._lost = True
            self._failures += 1
            what = "is tried again" if self._failures < PATIENCE else "is left until the run ends"
            print(f"MLflow failed ({_line(error)}) and {what}; {self.csv.path} has every step", file=sys.stderr)

    def _start(self) -> None:
        """Continue the MLflow run of the folder, or create it with the config; log what it lacks of the table."""
        self.csv.open()
        client, run_id = self.experiment, str(self.run_id)
        write_text(self._id_file, f"{run_id}\n")
        client.update_run(run_id, "RUNNING")
        data = client.get_run(run_id).data
        if not data.params and (file := self._id_file.with_name("config.yaml")).is_file():
            config = redact(yaml.safe_load(file.read_text(encoding="utf-8")))
            super().log_hyperparams(config)
            client.log_dict(run_id, config, file.name)
        self._logged = {name: max(one.step for one in client.get_metric_history(run_id, name)) for name in data.metrics}
        self._log_rows(self.csv.rows)
        self._lost = False

    def _known_run(self) -> str | None:
        """The id of the MLflow run of an earlier start, unless it was deleted."""
        from mlflow.exceptions import MlflowException

        run_id = self._id_file.read_text().strip() if self._id_file.is_file() else ""
        try:
            active = run_id and self._mlflow_client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id if active else None

    def _log_rows(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Log the values by step that MLflow does not have yet."""
        for step, row in rows.items():
            if new := {name: value for name, value in values_of(row).items() if step > self._logged.get(name, 0)}:
                super().log_metrics(new, step)
                self._logged |= dict.fromkeys(new, step)  # a checkpoint logs its step once more

    def _has(self, folder: str, start: str) -> bool:
        """Whether an earlier start has logged a file with this beginning of its name."""
        files = self.experiment.list_artifacts(str(self.run_id), folder)
        return any(Path(file.path).name.startswith(start) for file in files)


def _not_started(error: Exception) -> ConfigError:
    return ConfigError(f"MLflow does not start: {_line(error)}; check logger.tracking_uri or MLFLOW_TRACKING_URI.")


def _line(error: Exception) -> str:
    return redact_text(" ".join(str(error).split())[:200]).rstrip(".") or type(error).__name__
