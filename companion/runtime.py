"""How a notebook runs: its profile and sizes, its device, its threads, its clock, and many seeds at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TypeVar

import joblib
import threadpoolctl
import torch

PROFILES = ("book", "full", "smoke")
Result = TypeVar("Result")


def profile() -> str:
    """The profile that the environment variable ``BOOK_PROFILE`` asks for.

    ``"book"`` (default) runs in seconds on one CPU core, offline. ``"full"`` uses the paper's data and sizes, on a
    GPU where there is one. ``"smoke"`` follows the code path of ``"full"`` at toy sizes with stand-in data: it
    shows that the code runs, its numbers mean nothing.

    Raises
    ------
    ValueError
        If the variable names another profile.
    """
    name = os.environ.get("BOOK_PROFILE", "book")
    if name not in PROFILES:
        raise ValueError(f"BOOK_PROFILE must be one of {', '.join(PROFILES)}, got {name!r}")
    return name


def settings(*, book: Mapping, full: Mapping, smoke: Mapping) -> SimpleNamespace:
    """The sizes of a notebook for the current profile, all in one place.

    Parameters
    ----------
    book, full
        All sizes of the notebook; the same names in both.
    smoke
        The sizes in which the smoke profile differs from ``full``.

    Raises
    ------
    ValueError
        If a name is missing in one of the profiles.
    """
    if set(book) != set(full) or not set(smoke) <= set(full):
        raise ValueError(
            "book and full must name the same sizes, and smoke some of them; "
            f"book has {sorted(book)}, full has {sorted(full)}, smoke has {sorted(smoke)}"
        )
    return SimpleNamespace(**{"book": book, "full": full, "smoke": {**full, **smoke}}[profile()])


def device() -> torch.device:
    """CUDA where there is one and the profile is ``full``; the CPU otherwise."""
    return torch.device("cuda" if profile() == "full" and torch.cuda.is_available() else "cpu")


def one_thread() -> None:
    """Use one thread in this process: notebooks run side by side, one per core."""
    torch.set_num_threads(1)
    threadpoolctl.threadpool_limits(1)


@contextmanager
def stopwatch() -> Iterator[SimpleNamespace]:
    """Measure the block: ``.cpu`` and ``.wall`` seconds are set when it ends.

    CPU seconds are those of this process, all its threads together.
    """
    spent = SimpleNamespace(cpu=float("nan"), wall=float("nan"))
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        yield spent
    finally:
        spent.cpu, spent.wall = time.process_time() - cpu, time.perf_counter() - wall


def over_seeds(function: Callable[..., Result], seeds: Iterable, *, n_jobs: int | None = None) -> list[Result]:
    """Run ``function(seed)`` for every seed, in the order of ``seeds``, through joblib.

    ``seeds`` may be any grid of points. Where several workers run is decided outside, by ``joblib.parallel_config``
    (loky on this machine, Dask or Ray on a cluster); without it everything runs in this process.

    Parameters
    ----------
    function
        Must be importable (a module's function) when the workers are other processes.
    seeds
        The points to run, each handed over as the only argument.
    n_jobs
        Number of workers; None leaves it to ``joblib.parallel_config``.
    """
    return joblib.Parallel(n_jobs=n_jobs)(joblib.delayed(function)(seed) for seed in seeds)
