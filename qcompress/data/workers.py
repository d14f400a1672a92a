"""Worker processes that load batches ahead of the training; torch's DataLoader runs them."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from qcompress.errors import ConfigError, DataError, QCompressError
from qcompress.user_code import one_line

T = TypeVar("T")


def ahead(load: Callable[[int], T], steps: Sequence[int], workers: int) -> Iterator[T]:
    """Return an iterator over the batches of some steps, in their order.

    Args:
        load: returns the batch of a step, the same one in any process.
        steps: which ones.
        workers: processes that load them ahead; 0: each is loaded when its turn comes.

    Raises:
        ConfigError: the system cannot fork processes.
        DataError: a worker ended, because it ran out of memory for example.
    """
    if not workers or not steps:
        return map(load, steps)
    if "fork" not in torch.multiprocessing.get_all_start_methods():
        raise ConfigError("Workers need a system that can fork processes: use 0 workers.")
    return _from_workers(load, steps, workers)


class _Steps(Dataset[T | QCompressError]):
    """What a worker does: it loads the batch of a step, or returns the error that it met."""

    def __init__(self, load: Callable[[int], T]) -> None:
        self._load = load

    def __getitem__(self, step: int) -> T | QCompressError:
        try:
            return self._load(step)
        except QCompressError as e:
            return e


def _from_workers(load: Callable[[int], T], steps: Sequence[int], workers: int) -> Iterator[T]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about more workers than cores, and forks of processes that have threads
        before = signal.getsignal(signal.SIGCHLD)
        loaded = iter(
            DataLoader(
                _Steps(load),
                batch_size=None,
                sampler=steps,
                num_workers=min(workers, len(steps)),
                collate_fn=_as_it_is,
                multiprocessing_context="fork",
                generator=torch.Generator(),  # the global one belongs to the training
                worker_init_fn=_ignore_interrupts,
            )
        )
    if threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever training is when a worker ends; `next` finds out by itself, within 5 seconds.
        signal.signal(signal.SIGCHLD, before)
    try:
        while True:
            try:
                result = next(loaded)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError) as e:
                if str(e).startswith("Caught "):  # it was raised by what the worker ran
                    raise
                raise DataError(f"a worker that loads batches ended ({one_line(e)}): use fewer workers, or 0.") from e
            if isinstance(result, QCompressError):
                raise result
            yield result
    finally:
        getattr(loaded, "_shutdown_workers")()  # noqa: B009 - an exception's traceback would keep them alive


def _as_it_is(batch: T) -> T:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the training process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
