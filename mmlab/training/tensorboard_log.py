"""A run's metrics, tables and images in TensorBoard, with the CSV table beside it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from mmlab.config.errors import ConfigError
from mmlab.training.config import CSVLogConfig, TensorBoardLogConfig
from mmlab.training.csv_log import CSVLog, values_of


class TensorBoardLog(TensorBoardLogger):
    """Logs to `<save_dir>/tensorboard` and `<save_dir>/metrics.csv`; a step is a finished optimizer step.

    Each start of a run writes a file of its own, which makes TensorBoard drop the later steps of earlier files.

    Args:
        config: settings.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, config: TensorBoardLogConfig):
        if find_spec("tensorboard") is None:
            raise ConfigError("logger=tensorboard needs a package: pip install 'mmlab[tensorboard]'.")
        super().__init__(config.save_dir, name="tensorboard", version="")
        self.csv = CSVLog(CSVLogConfig(save_dir=config.save_dir))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run's config is beside the folder."""

    @rank_zero_only
    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Keep the module, whose trainer counts the steps: Lightning calls this when training begins."""
        self.csv.log_graph(model)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add values to a step; see `CSVLog.log_metrics`."""
        self.csv.log_metrics(metrics, step)
        done = self.csv.last_step
        # The first step of a file replaces all that earlier files have of it.
        row = metrics if "purge_step" in self._kwargs else self.csv.rows.get(done, {})
        self._begin(done)
        super().log_metrics(values_of(row), done)

    @rank_zero_only
    def log_pictures(
        self, name: str, pictures: Sequence[Any], step: int, captions: Sequence[str] | None = None
    ) -> None:
        """Log PIL images or uint8 arrays `[H, W, 3]` as `<name>/<n>`, and their captions as a text."""
        self._begin(step)
        for n, picture in enumerate(pictures):
            pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
            self.experiment.add_image(f"{name}/{n}", pixels, step, dataformats="HWC")
        if captions is not None:
            self.experiment.add_text(
                f"{name}/captions", "\n".join(f"{n}. {text}" for n, text in enumerate(captions)), step
            )

    @rank_zero_only
    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table of text and numbers as Markdown; its images are logged separately, and their cells hold names."""
        pictures: list[Image.Image] = []
        lines = [columns, ["---"] * len(columns)]
        for row in rows:
            cells = list(row)
            for n, cell in enumerate(row):
                if isinstance(cell, Image.Image):
                    cells[n] = f"{name}/{len(pictures)}"
                    pictures.append(cell)
            lines.append([str("" if cell is None else cell).replace("|", "\\|").replace("\n", " ") for cell in cells])
        self.log_pictures(name, pictures, step)
        self.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def save(self) -> None:
        """Flush the file; Lightning would write hyperparameters beside it."""
        if self._experiment is not None:
            self._experiment.flush()

    def _begin(self, step: int) -> None:
        """Let this start's file, opened by its first value, replace what earlier files have from `step` on."""
        self._kwargs.setdefault("purge_step", step)
