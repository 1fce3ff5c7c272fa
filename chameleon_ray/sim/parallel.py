"""Many independent runs over the cores, with a progress line."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def map_tasks(
    work: Callable[[Task], Answer], tasks: Iterable[Task], label: str, num_workers: int | None = None
) -> list[Answer]:
    """``work`` of each task, in the order of the tasks. work: picklable. num_workers: None takes all cores."""
    todo = list(tasks)
    num_workers = min(num_workers or os.cpu_count() or 1, len(todo))
    if num_workers <= 1:
        answers = []
        for number, task in enumerate(todo):
            show_progress(label, number / len(todo))
            answers.append(work(task))
        show_progress(label, None)
        return answers
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, task) for task in todo]
        for number, _ in enumerate(as_completed(futures)):
            show_progress(label, number / len(todo))
        show_progress(label, None)
        return [future.result() for future in futures]


def show_progress(label: str, share: float | None) -> None:
    """A bar on a terminal's standard error; None wipes it."""
    if sys.stderr.isatty():
        bar = "" if share is None else f"{label} [{'#' * int(30 * share):30}] {share:4.0%}"
        print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)
