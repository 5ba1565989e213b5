"""The full profile's code runs: every notebook from top to bottom at toy sizes, with stand-ins for downloads."""

import nbformat
from nbclient import NotebookClient


def test_the_code_of_the_full_profile_runs(notebook_path, monkeypatch, tmp_path):
    monkeypatch.setenv("BOOK_PROFILE", "smoke")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as when the book is built
    notebook = nbformat.read(notebook_path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    loud = [cell.source for cell in notebook.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"]
    assert not loud, f"something is written to stderr by {loud[0]}"
