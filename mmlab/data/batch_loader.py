"""The loader around `LocalBatches`; imports no Lightning, so that spawned workers start fast."""

import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmlab.config.errors import RunError, UserError

IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class LocalLoader:
    """Batches `start() … stop - 1` of a map-style dataset, in order for any number of workers.

    It is deliberately not a `DataLoader`: Lightning replaces the sampler of those on several devices. Its length
    counts from 0 even when it starts later, as Lightning's progress does after a resume. `start` is called at the
    first batch, when all state is restored.

    Args:
        dataset: maps an item number to a batch.
        stop: the length.
        start: returns the first item.
        workers: processes that make batches; 0 makes them here.
        pin_memory: page-lock tensors, for a CUDA device.
        context: start method of the workers (`fork`, `spawn`, `forkserver`); None: the platform's.
    """

    def __init__(
        self,
        dataset: Dataset,
        stop: int,
        start: Callable[[], int],
        workers: int,
        *,
        pin_memory: bool = False,
        context: str | None = None,
    ):
        self.stop = stop
        self._loader = DataLoader(
            _Guarded(dataset),
            batch_size=None,
            sampler=_From(start, stop),
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=pin_memory,
            # Its own: otherwise it would advance the generator of training, by an amount that depends on the workers.
            generator=torch.Generator(),
            persistent_workers=workers > 0,
            worker_init_fn=quiet_worker,
            multiprocessing_context=context if workers else None,
        )
        self._workers: list[BaseProcess] = []
        # On exit, Python sends SIGTERM to its children and waits forever; workers ignore it, so they must be gone
        # by then. Unlike atexit, this also runs in ranks that multiprocessing started.
        Finalize(self, _kill, (self._workers,), exitpriority=0)

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[Any]:
        """Yield batches; raises the dataset's own UserErrors unchanged, and RunError for a killed worker."""
        try:
            for batch in self._start():
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except (RuntimeError, OSError, EOFError) as error:  # OSError, EOFError: it died while it handed over a batch
            # Torch may know of a dead worker before its process counts as dead.
            if "DataLoader worker (pid" not in str(error) and all(worker.is_alive() for worker in self._workers):
                raise
            raise RunError(f"a data worker died ({error}); the usual cause is lack of memory.") from error

    def _start(self) -> Iterator[Any]:
        """Start the workers with the signals of `IGNORED` blocked, and without torch's SIGCHLD handler.

        That handler raises wherever the main thread happens to be, perhaps while it writes a checkpoint; a dead
        worker is also noticed here, when its batch does not arrive.
        """
        in_main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)  # children inherit it
        try:
            iterator = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if in_main:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
        self._workers[:] = getattr(iterator, "_workers", [])
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Empty: the owner of `start` keeps the position. Lightning concludes that the loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do, see `state_dict`."""

    def close(self) -> None:
        """Stop the workers; those that do not exit are killed."""
        iterator: Any = self._loader._iterator
        self._loader._iterator = None
        if iterator is not None and self._loader.num_workers:
            iterator._shutdown_workers()
            _kill(self._workers)


class _From(Sampler[int]):
    def __init__(self, start: Callable[[], int], stop: int):
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start(), self.stop))

    def __len__(self) -> int:
        return self.stop


class _Guarded(Dataset):
    """Returns a UserError as an item: torch would wrap its one sentence in the worker's traceback."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch  # torch's default turns numpy arrays inside a batch into tensors


def quiet_worker(_: int) -> None:
    """Set up a worker: one thread, and ignore the signals that ask the run to save and stop.

    A cluster sends those to every process of a job; the batches in flight are still needed for the last step.
    A worker whose parent is gone exits without them.
    """
    torch.set_num_threads(1)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
