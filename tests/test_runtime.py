"""Profiles, sizes, clock and seeds."""

import joblib
import pytest
import torch
from dask.distributed import Client, LocalCluster

from companion import runtime

SIZES = {"book": {"steps": 10, "seeds": 3}, "full": {"steps": 1000, "seeds": 20}, "smoke": {"steps": 1}}


@pytest.mark.parametrize(("name", "steps", "seeds"), [("book", 10, 3), ("full", 1000, 20), ("smoke", 1, 20)])
def test_settings_follow_the_profile(monkeypatch, name, steps, seeds):
    monkeypatch.setenv("BOOK_PROFILE", name)
    sizes = runtime.settings(**SIZES)
    assert (runtime.profile(), sizes.steps, sizes.seeds) == (name, steps, seeds)


def test_default_profile_is_book_on_the_cpu(monkeypatch):
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runtime.profile() == "book"
    assert runtime.device() == torch.device("cpu")


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_full_profile_takes_a_gpu_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setenv("BOOK_PROFILE", "full")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert runtime.device() == torch.device(expected)


def test_bad_profiles_are_named(monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "fast")
    with pytest.raises(ValueError, match="BOOK_PROFILE must be one of book, full, smoke, got 'fast'"):
        runtime.profile()
    with pytest.raises(ValueError, match=r"book has \['seeds'\], full has \['seed'\]"):
        runtime.settings(book={"seeds": 1}, full={"seed": 1}, smoke={})
    with pytest.raises(ValueError, match=r"smoke has \['steps'\]"):
        runtime.settings(book={"seeds": 1}, full={"seeds": 1}, smoke={"steps": 1})


def test_stopwatch_counts_work_and_not_waiting():
    with runtime.stopwatch() as working:
        torch.randn(400, 400, dtype=torch.float64).matrix_power(50)
    assert working.cpu > 0
    with runtime.stopwatch() as waiting:
        torch.multiprocessing.Event().wait(0.2)
    assert waiting.wall >= 0.2 > 0.1 > waiting.cpu


def test_one_thread():
    runtime.one_thread()
    assert torch.get_num_threads() == 1


def cube(seed: int) -> int:
    return seed**3


def test_seeds_run_in_order_here_and_on_other_workers():
    expected = [cube(seed) for seed in range(6)]
    assert runtime.over_seeds(cube, range(6)) == expected
    with joblib.parallel_config("loky", n_jobs=2):
        assert runtime.over_seeds(cube, range(6)) == expected


def where(seed: int) -> tuple[int, str]:
    from distributed import get_worker

    return seed, get_worker().name


def test_seeds_run_on_a_dask_cluster_unchanged():
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None)
    with cluster, Client(cluster), joblib.parallel_config("dask"):
        results = runtime.over_seeds(where, range(8))
    assert [seed for seed, _ in results] == list(range(8))
