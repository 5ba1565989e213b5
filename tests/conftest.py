"""What several tests need: where things are, and the tutorials of the book."""

import sys
from pathlib import Path

import nbformat
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).parents[1]
SCRIPTS = Path(sys.executable).parent  # where pip puts command-line tools
THEMES = ("linear_dynamics", "collapse", "robustness", "interpretability", "scientific_ml")
# No deadline, because a busy machine is no defect; the same examples on every run, because CI must be repeatable.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")
NOTEBOOKS = sorted((ROOT / "book").glob("*/*.ipynb"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``notebook_path`` or ``theme`` runs once for each notebook or theme with notebooks."""
    if "notebook_path" in metafunc.fixturenames:
        metafunc.parametrize("notebook_path", NOTEBOOKS, ids=[f"{path.parent.name}/{path.stem}" for path in NOTEBOOKS])
    if "theme" in metafunc.fixturenames:
        metafunc.parametrize("theme", [name for name in THEMES if any(path.parent.name == name for path in NOTEBOOKS)])


@pytest.fixture
def notebook(notebook_path: Path) -> nbformat.NotebookNode:
    return nbformat.read(notebook_path, as_version=4)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run side by side, as notebooks do."""
    torch.set_num_threads(1)
