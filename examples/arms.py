"""What the fine-tuning examples share: runs in other processes, and files that are whole or not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any


class Here(Executor):
    """Calls at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def processes(here: bool, count: int = 1) -> Executor:
    """To call in: ``count`` other processes, or this one."""
    return Here() if here else ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def run_all(
    pool: Executor, jobs: int, run: Callable[[Any], dict[str, Any]], arms: Iterable[Any], deadline: float
) -> Iterator[dict[str, Any]]:
    """Runs ``jobs`` arms at a time, and begins none after the deadline; yields each result as it comes."""
    queue = iter(arms)
    running: set[Future[dict[str, Any]]] = set()
    while True:
        while len(running) < jobs and time.monotonic() < deadline and (arm := next(queue, None)) is not None:
            running.add(pool.submit(run, arm))
        if not running:
            return
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            yield future.result()


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """A file that appears when it is complete."""
    unfinished = path.with_suffix(".part")
    save(unfinished)
    unfinished.rename(path)
