"""The cache of executed notebooks: it must miss when anything that a notebook's results depend on has changed."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

from tools import execute


@pytest.fixture
def checkout(tmp_path):
    """A copy of the companion, one notebook that uses ``training`` and one that uses ``data``, and so ``runtime``."""
    shutil.copytree(ROOT / "companion", tmp_path / "companion")
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, source in {
        "collapse/trains": "from companion import training\ntraining.__doc__",
        "robustness/reads": "from companion.data import digits\nif True:\n    %time _ = digits()",
    }.items():
        path = tmp_path / "book" / f"{name}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)], metadata=kernel), path)
    return tmp_path


def run(checkout, expected_returncode=0, **environment):
    """Execute the copy's notebooks; return the names of those that really ran."""
    result = subprocess.run(
        [sys.executable, "-m", "tools.execute", "book", "cache", "report.json"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == expected_returncode, result.stderr
    return (
        {name for name in ("trains", "reads") if f"{name}.ipynb" in result.stderr.split("Executing: ", 1)[-1]}
        if ("Executing: " in result.stderr)
        else set()
    )


def test_exactly_the_right_notebooks_run_again(checkout):
    assert run(checkout) == {"trains", "reads"}
    assert run(checkout) == set()
    assert set(json.loads((checkout / "report.json").read_text())) == {
        "book/collapse/trains.ipynb",
        "book/robustness/reads.ipynb",
    }

    def edit(name):
        with (checkout / "companion" / name).open("a") as module:
            module.write("\n# edited\n")

    edit("training.py")
    assert run(checkout) == {"trains"}
    edit("runtime.py")  # imported by data, not by the notebook itself
    assert run(checkout) == {"reads"}
    edit("plotting.py")  # used by neither
    assert run(checkout) == set()
    assert run(checkout, BOOK_PROFILE="smoke") == {"trains", "reads"}


def test_a_failing_notebook_stops_the_build_and_is_named(checkout):
    path = checkout / "book" / "collapse" / "trains.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "raise RuntimeError('broken on purpose')"
    nbformat.write(notebook, path)
    run(checkout, expected_returncode=1)
    assert not (checkout / "report.json").exists()


def test_another_version_of_a_dependency_is_another_fingerprint(checkout, monkeypatch):
    notebooks = sorted((checkout / "book").glob("*/*.ipynb"))
    before = execute.fingerprints(notebooks)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "scipy" else version(name))
    after = execute.fingerprints(notebooks)
    assert all(before[path] != after[path] for path in notebooks)
