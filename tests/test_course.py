"""The course, with nbgrader itself: a solved notebook gets full marks, an untouched one none.

Graded are the set-up cell and the exercises, without the experiment between them: an exercise needs nothing else.
"""

import os
import shutil
import subprocess
import sys

import nbformat
from conftest import ROOT, SCRIPTS
from nbgrader.api import Gradebook


def nbgrader(course, command, *arguments):
    result = subprocess.run(
        [sys.executable, "-m", "nbgrader", command, *arguments], cwd=course, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-5000:]


def without_the_experiment(path):
    """Leave what an exercise may rest on, the set-up cell, and the exercises themselves."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "markdown" or "nbgrader" in cell.metadata or "runtime.settings(" in cell.source
    ]
    nbformat.write(notebook, path)


def test_a_solved_theme_gets_full_marks_and_an_untouched_one_none(theme, tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    monkeypatch.setenv("PATH", str(SCRIPTS), prepend=os.pathsep)  # nbgrader calls alembic by its name
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    source = tmp_path / "book" / theme
    source.mkdir(parents=True)
    for path in (ROOT / "book" / theme).glob("*.ipynb"):
        shutil.copy(path, source)
    names = sorted(path.stem for path in source.glob("*.ipynb"))

    nbgrader(tmp_path, "generate_assignment", theme, "--create")
    release = tmp_path / "release" / theme
    for name in names:
        text = (release / f"{name}.ipynb").read_text(encoding="utf-8")
        assert "SOLUTION" not in text
        assert "HIDDEN TESTS" not in text
        assert "raise NotImplementedError" in text
    shutil.copytree(release, tmp_path / "submitted" / "untouched" / theme)
    shutil.copytree(source, tmp_path / "submitted" / "solved" / theme)
    for path in (tmp_path / "submitted").glob("*/*/*.ipynb"):
        without_the_experiment(path)
    nbgrader(tmp_path, "autograde", theme)

    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as gradebook:
        for name in names:
            solved = gradebook.find_submission_notebook(name, theme, "solved")
            untouched = gradebook.find_submission_notebook(name, theme, "untouched")
            assert solved.max_score > 0
            assert solved.score == solved.max_score, name
            assert untouched.score == 0, name
