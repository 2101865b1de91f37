"""Shards as a LightningDataModule: mixture, order, batches, and the one number that a resume needs."""

from collections.abc import Callable
from fractions import Fraction
from functools import cached_property
from math import floor
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from mmlab.config.errors import ConfigError, RunError
from mmlab.data.batch_loader import LocalLoader
from mmlab.data.bucket_mixture import bucket_sizes, by_bucket, small_buckets
from mmlab.data.config import ShardsConfig
from mmlab.data.mixture import Source, by_type, open_sources
from mmlab.data.reader import BucketPass, Collate, GlobalBatches, LocalBatches, OnePass
from mmlab.data.stream_loader import StreamLoader, say_promises
from mmlab.data.walked_shards import open_or_walk
from mmlab.runs.identity import compare
from mmlab.runs.ranks import accumulation

FIXED = ("global_batch", "seed", "block_shards", "balance")
"""Settings that decide the order of samples, and so cannot change on a resume."""


class ShardDataModule(L.LightningDataModule):
    """Training and validation data from folders of shards.

    One Lightning epoch spans the whole run: `plan` fixes the number of steps, the training loader is that
    long, and nothing is dropped between passes over the data. The state is the number of samples *trained*;
    ranks, accumulation and workers may differ after a resume, the global batch may not. Build the trainer
    with `max_steps=data.plan(…)`, `max_epochs=-1` and `accumulate_grad_batches=data.accumulation(world)`.

    Args:
        config: settings.
        collate: prepares samples and makes batches.
        loader: reads training shards that have no index; None: all have one.

    Raises:
        ConfigError: no training source, or weights that are missing or contradict `balance`.
    """

    def __init__(self, config: ShardsConfig, collate: Collate, loader: StreamLoader | None = None):
        super().__init__()
        config.check_mixture()
        self.config = config
        self.collate = collate
        self.stream = loader
        self.total_steps: int | None = None
        self._base = 0  # samples trained when the loader started …
        self._mark: int | None = None  # … and Lightning's count of micro-batches then; None = not started
        self._loaders: list[LocalLoader] = []

    @cached_property
    def train_sources(self) -> list[Source]:
        """The open training sources, or their parts by bucket or type; raises what `open_sources`, `by_type` raise."""
        sources = open_sources(self.config, self.config.train)
        if self.config.shapes:
            return by_bucket(sources, self.config.shapes)
        return by_type(sources) if self.config.balance == "type" else sources

    @cached_property
    def val_sources(self) -> list[Source]:
        """The open validation sources, or their parts by bucket; raises what `open_sources`, `open_or_walk` raise."""
        if self.stream and self.config.val:
            return open_or_walk(self.config, self.config.val)
        sources = open_sources(self.config, self.config.val)
        return by_bucket(sources, self.config.shapes) if self.config.shapes else sources

    @property
    def samples(self) -> int:
        """Training samples over all sources: one pass, which `max_epochs` counts."""
        self.config.check_epochs()
        return self.config.loader.samples if self.stream else sum(len(source) for source in self.train_sources)

    def accumulation(self, world: int) -> int:
        """Micro-batches per step on each of `world` processes; ConfigError unless that is a whole number."""
        return accumulation(self.config.global_batch, self.config.micro_batch, world)

    def plan(self, max_steps: int | None = None, max_epochs: float | None = None) -> int:
        """Fix and return the optimizer steps of the whole run: the smaller limit; None or -1 means no limit.

        Raises:
            ConfigError: no limit, or fewer samples than one global batch.
        """
        limits = []
        if max_steps is not None and max_steps >= 0:
            limits.append(max_steps)
        if max_epochs is not None and max_epochs >= 0:
            limits.append(floor(Fraction(str(max_epochs)) * self.samples / self.config.global_batch))
        if not limits:
            raise ConfigError("the run has no length; set trainer.max_steps or trainer.max_epochs.")
        steps = min(limits)
        if steps == 0:
            raise ConfigError(
                f"max_steps={max_steps}, max_epochs={max_epochs} give no step: there are"
                f" {self.samples} samples and global_batch={self.config.global_batch}."
            )
        self.total_steps = steps
        return steps

    @property
    def position(self) -> int:
        """Samples trained so far, in whole optimizer steps: no checkpoint holds a part of a step."""
        if self.trainer is None or self._mark is None:
            return self._base
        micro = self._micro_batches_done() - self._mark
        return self._base + micro // self.accumulation(self.trainer.world_size) * self.config.global_batch

    @property
    def sources(self) -> dict[str, str]:
        """Contents (as a hash) and weight of each training source: all that decides the order beside `FIXED`."""
        if self.stream:
            return {s.name: f"{s.hash} x {s.weight}" for s in self.stream.sources(self.config)}
        return {s.name: f"{s.index.hash} x {s.weight}" for s in self.train_sources}

    def state_dict(self) -> dict[str, Any]:
        state = {"position": self.position, **self._fixed(), "sources": self.sources}
        if self.stream:
            trained = self.position // self.config.global_batch * self.accumulation(self._place()[0])
            state["stream"] = self.stream.state_dict(trained, self.config)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's position; only training does.

        Raises:
            ConfigError: seed, global batch, block size, balance or buckets are not the checkpoint's.
            RunError: a source was added, removed, reweighted, reordered or rebuilt with other contents.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        for name, now in self._fixed().items():
            then = state_dict.get(name, [])
            if then != now:
                raise ConfigError(
                    f"the checkpoint was made with data.{name}={then}, this run has {now}:"
                    f" the order of samples would change; keep {then} or start a new run."
                )
        compare({"train": state_dict["sources"]}, {"train": self.sources}, "the checkpoint")
        self._base, self._mark = state_dict["position"], None
        if self.stream:
            self.stream.load_state_dict(state_dict["stream"], self.config, *self._place())

    def setup(self, stage: str) -> None:
        if stage == "fit":  # before Lightning restores a checkpoint
            self._base, self._mark = 0, None
            if self.stream:
                self.stream.reset()

    def train_dataloader(self) -> LocalLoader:
        world, rank = self._place()
        micro_per_step = self.accumulation(world)
        steps = self.total_steps or self.plan(self.trainer.max_steps if self.trainer else None)
        if self.trainer is not None:
            self._check_trainer(micro_per_step)
            self._align_progress(micro_per_step)
        cut = GlobalBatches(self.config.global_batch, self.config.micro_batch, world, rank)
        if self.stream:
            say_promises(self.stream.config)
            stop = steps * micro_per_step
            return self._kept(self.stream.load(self.config, self.collate, cut, stop, self._begin, self._on_cuda))
        if self.config.shapes and (small := small_buckets(self.train_sources, self.config.global_batch)):
            rank_zero_warn(small)
        return self._loader(self.train_sources, cut, steps * micro_per_step, self._begin)

    def val_dataloader(self) -> LocalLoader | list[LocalLoader]:
        return self._pass(self.val_sources) if self.config.val else []

    def spread(self, count: int, training: bool = False) -> LocalLoader:
        """One pass over about `count` samples, spread evenly over the validation sources, or else the training ones.

        Args:
            count: of samples.
            training: whether they are training samples also where there are validation sources.
        """
        if self.stream and (training or not self.config.val):
            cut = GlobalBatches(self.config.global_batch, self.config.micro_batch, *self._place())
            return self._kept(self.stream.spread(self.config, self.collate, cut, count))
        sources = self.val_sources if self.config.val and not training else self.train_sources
        return self._pass(sources, max(1, sum(map(len, sources)) // count))

    def _pass(self, sources: list[Source], every: int = 1) -> LocalLoader:
        place = self.config.micro_batch, *self._place(), every
        if self.config.shapes:
            cut = BucketPass(tuple(bucket_sizes(sources).values()), *place)
        else:
            cut = OnePass(sum(map(len, sources)) // every, *place)
        if len(cut) == 0:
            raise ConfigError(f"{cut.samples} validation samples are fewer than the {cut.world} processes.")
        if cut.dropped:
            divided = f"{cut.samples} is" if isinstance(cut, OnePass) else "the buckets' numbers of images are"
            rank_zero_warn(
                f"validation leaves out the last {cut.dropped} of {cut.samples} samples, because {divided}"
                f" not divisible by {cut.world} processes."
            )
        return self._loader(sources, cut, len(cut))

    def teardown(self, stage: str) -> None:
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def _loader(
        self,
        sources: list[Source],
        cut: GlobalBatches | OnePass | BucketPass,
        stop: int,
        start: Callable[[], int] = lambda: 0,
    ) -> LocalLoader:
        dataset = LocalBatches(sources, self.collate, cut, self.config)
        return self._kept(LocalLoader(dataset, stop, start, self.config.workers, pin_memory=self._on_cuda))

    def _kept(self, loader: LocalLoader) -> LocalLoader:
        """The loader, to be closed at the end."""
        self._loaders.append(loader)
        return loader

    @property
    def _on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _begin(self) -> int:
        """The first micro-batch of this rank; called whenever Lightning starts the loader."""
        trainer: Any = self.trainer
        if trainer is not None and trainer.overfit_batches > 0:
            return 0
        self._base, self._mark = self.position, self._micro_batches_done()
        step = self._base // self.config.global_batch
        if step >= (self.total_steps or 0):
            raise RunError(f"all {self.total_steps} planned steps are trained, but the trainer asks for more.")
        first = step * self.accumulation(self._place()[0])
        counted = trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer else 0
        if counted not in (0, first):
            raise RunError(
                f"the data resumes at micro-batch {first}, Lightning at {counted}: the stage asked for the"
                " data before the checkpoint was restored."
            )
        return first

    def _place(self) -> tuple[int, int]:
        # Only in the main process: a spawned worker has no process group.
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def _micro_batches_done(self) -> int:
        """Lightning's count of trained micro-batches, which, unlike `global_step`, is independent of optimizers."""
        if self.trainer is None:
            return 0
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return total.processed

    def _fixed(self) -> dict[str, Any]:
        fixed: dict[str, Any] = {name: getattr(self.config, name) for name in FIXED}
        return fixed | {"buckets": [list(shape) for shape in self.config.shapes]}

    def _check_trainer(self, micro_per_step: int) -> None:
        """Lightning must step when a global batch is full; with manual optimization the stage does."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        accumulate = self.trainer.accumulate_grad_batches
        if module is not None and module.automatic_optimization and accumulate != micro_per_step:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={accumulate}, but global_batch={self.config.global_batch} and"
                f" micro_batch={self.config.micro_batch} on {self.trainer.world_size} devices need {micro_per_step}."
            )

    def _align_progress(self, micro_per_step: int) -> None:
        """After a resume, make Lightning count the completed steps in the micro-batches of *this* run.

        Its progress is in micro-batches of the run that saved it; with another accumulation it would end
        early and step within a global batch.
        """
        assert self.trainer is not None
        current: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        unfinished = current.processed - current.completed
        if self._base and current.processed:
            done = self._base // self.config.global_batch * micro_per_step
            current.ready = current.started = current.processed = done
            current.completed = current.processed - unfinished


class ImageTextData(ShardDataModule):
    """Images with texts: `ImageTextDataConfig`."""


class ImageData(ShardDataModule):
    """Images, or their cached latents or codes: `ImageDataConfig`."""
