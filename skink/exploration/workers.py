"""Points in this process, or in several processes side by side, each with a bench of its own."""

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from skink.errors import SpaceError
from skink.exploration.options import ExploreOptions
from skink.exploration.points import Point
from skink.exploration.workbench import Workbench

# What to make, and where to leave the model.
Task = tuple[Point, Path | None]
Runner = Callable[[Sequence[Task]], Iterator[tuple[int, dict[str, Any]]]]

# The bench of a worker process, made when the process starts.
_bench: Workbench | None = None


@contextmanager
def runner(bench: Workbench, options: ExploreOptions) -> Iterator[Runner]:
    """A function from tasks to (place of the task, its record), in the order in which they are finished.

    Args:
        bench: of this process; its name is what others load the model by.
        options: `jobs` says how many processes; with 1, this one.

    Raises:
        SpaceError: SPACE-006 from the function, where a process dies.
    """
    if options.jobs == 1:
        yield lambda tasks: ((index, bench.run(*task)) for index, task in enumerate(tasks))
        return
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        options.jobs,
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(bench.name, options, max(1, torch.get_num_threads() // options.jobs)),
    )
    finished = False
    try:
        yield lambda tasks: _side_by_side(pool, tasks)
        finished = True
    finally:
        if not finished:
            # A point may take minutes, and whoever interrupts will not wait for it.
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
        pool.shutdown(cancel_futures=True)


def _side_by_side(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        futures: dict[Future[dict[str, Any]], int] = {
            pool.submit(_run, *task): index for index, task in enumerate(tasks)
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise SpaceError(
            "SPACE-006",
            "a worker process died.",
            why=str(error),
            fix="run the command again, with fewer --jobs: memory is the usual cause.",
        ) from error


def _start(name: str, options: ExploreOptions, threads: int) -> None:
    """Make a worker's bench. Ctrl-C is the parent's to hear."""
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _bench = Workbench.load(name, options)


def _run(point: Point, folder: Path | None) -> dict[str, Any]:
    if _bench is None:
        raise RuntimeError("a worker runs nothing before it has started")
    return _bench.run(point, folder)
