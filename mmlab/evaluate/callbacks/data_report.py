"""The data report of a run: what its batches really contained, as `data_report.json` in its folder."""

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from mmlab.data.config import ShardsConfig
from mmlab.data.counters import DataReport
from mmlab.data.remote.fetch_metrics import FetchMetrics
from mmlab.evaluate.config import DataReportCallbackConfig
from mmlab.runs.disk import write_json, writing_later

FILE_NAME = "data_report.json"


class DataReportCallback(L.Callback):
    """Writes the counters of a run's batches to `data_report.json`, and stops the run if it is over budget.

    The file is in the trainer's `default_root_dir` and is updated after each validation, at the end and on an
    exception; its counts continue after a resume. Every rank checks the budget on its own batches. The file has the
    sums over the ranks, except after an exception, when other ranks may be gone: then `ranks` is 1. `data/replaced` of
    all ranks is logged and, for remote shards, what `FetchMetrics` measures, as means over the ranks.

    Args:
        config: settings.
    """

    def __init__(self, config: DataReportCallbackConfig):
        self._limits = config.budget, config.floor
        self.train, self.validation = DataReport(*self._limits), DataReport(*self._limits)
        self._step = 0
        self._started = False
        self._fetching: FetchMetrics | None = None

    def on_train_start(self, trainer, pl_module) -> None:
        self._step, self._started = trainer.global_step, True
        config = getattr(getattr(trainer, "datamodule", None), "config", None)
        if isinstance(config, ShardsConfig) and config.remote:
            self._fetching = FetchMetrics(config.cache, self._step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.train.add(batch)
        if self._fetching is not None:
            self._fetching.add(batch)
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if self._step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
                count = float(self.train.replaced)
                pl_module.log("data/replaced", count, batch_size=1, sync_dist=True, reduce_fx="sum")
                for name, value in self._fetching.values(self._step).items() if self._fetching else ():
                    pl_module.log(name, value, batch_size=1, sync_dist=True)
        self.train.check()

    def on_validation_start(self, trainer, pl_module) -> None:
        self.validation = DataReport(*self._limits)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validation.add(batch)
        self.validation.check()

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, everyone=True)

    def on_train_end(self, trainer, pl_module) -> None:
        self._write(trainer, everyone=True)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self._started:  # the counts of the checkpoint are restored; before that there is nothing to report
            self._write(trainer, everyone=False)

    def state_dict(self) -> dict[str, Any]:
        # Lightning collects the state of every rank and saves the first one's, which has to hold the sums.
        return _merged(self.train).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = DataReport(*self._limits)
        if not _several_ranks() or dist.get_rank() == 0:
            self.train.add(state_dict)

    def _write(self, trainer: L.Trainer, everyone: bool) -> None:
        train, validation = (_merged(r) if everyone else r for r in (self.train, self.validation))
        if trainer.is_global_zero:
            ranks = trainer.world_size if everyone else 1
            report = {"ranks": ranks, "train": train.summary(), "validation": validation.summary()}
            file = Path(trainer.default_root_dir) / FILE_NAME
            with writing_later(file):
                write_json(file, report)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _merged(report: DataReport) -> DataReport:
    """The sum over all ranks; a collective call where there are several."""
    if not _several_ranks():
        return report
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, report.state_dict())
    merged = DataReport(report.budget, report.floor)
    for state in states:
        merged.add(state)
    return merged
