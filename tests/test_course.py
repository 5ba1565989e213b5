"""The course, with nbgrader itself: a solved notebook gets full marks, an untouched one none.

The notebooks run in the smoke profile: the code path of the full profile at toy sizes, with stand-in data. So this also
shows that that code runs.
"""

import shutil
import subprocess
import sys

import nbformat
from conftest import ROOT
from nbgrader.api import Gradebook


def nbgrader(course, command, *arguments):
    result = subprocess.run(
        [sys.executable, "-m", "nbgrader", command, *arguments], cwd=course, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-5000:]


def test_a_solved_theme_gets_full_marks_and_an_untouched_one_none(theme, tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
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
    nbgrader(tmp_path, "autograde", theme)

    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as gradebook:
        for name in names:
            solved = gradebook.find_submission_notebook(name, theme, "solved")
            untouched = gradebook.find_submission_notebook(name, theme, "untouched")
            assert solved.max_score > 0
            assert solved.score == solved.max_score, name
            assert untouched.score == 0, name

    # The solved notebook ran from top to bottom without an error: so does the full profile's code.
    for name in names:
        notebook = nbformat.read(tmp_path / "autograded" / "solved" / theme / f"{name}.ipynb", as_version=4)
        errors = [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"]
        assert not errors, f"{name}: {errors[0].ename}: {errors[0].evalue}"
