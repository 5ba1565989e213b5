"""The contract cells: what a notebook shows when it is executed is what is committed, measured digits aside.

The notebooks are not executed once more: `make book` and `make test` leave them executed in the cache, nbval compares.
`make nbval` is the same comparison on a fresh execution of every cell.
"""

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT
from jupyter_cache import get_cache
from nbval.plugin import IPyNbFile, get_sanitize_patterns

from tools import execute

CACHE = ROOT / "_build" / ".jupyter_cache"


@pytest.fixture(scope="module")
def fingerprints():
    return execute.fingerprints(NOTEBOOKS)


def differences(committed, executed, request):
    """What nbval has to say about the checked cells of two versions of a notebook; nothing if it is content."""
    file = IPyNbFile.from_parent(request.session, path=committed)
    file.compare_outputs = False  # only the cells that ask for it
    file.sanitize_patterns.update(get_sanitize_patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text()))
    fresh = [cell for cell in executed.cells if cell.cell_type == "code"]
    found = []
    for item, cell in zip(file.collect(), fresh, strict=True):
        if item.options["check"] and not item.compare_outputs(cell.outputs, item.cell.outputs):
            found += item.comparison_traceback
    return found


def test_the_contract_cell_shows_what_is_committed(notebook, notebook_path, fingerprints, request):
    cache = get_cache(CACHE)
    try:
        record = cache.match_cache_notebook(notebook)
    except KeyError:
        record = None
    if record is None or record.data.get("fingerprint") != fingerprints[notebook_path]:
        pytest.skip("not executed as it is now: run `make test`, or `make book`, first")
    assert not differences(notebook_path, cache.get_cache_bundle(record.pk).nb, request)


def test_a_changed_verdict_is_found_and_changed_digits_are_not(tmp_path, request):
    def contract(measured, verdict):
        text = f"C1 | measured: {measured} | {verdict}"
        output = nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=1)
        cell = nbformat.v4.new_code_cell("report", outputs=[output], metadata={"tags": ["nbval-check-output"]})
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)"), cell])

    nbformat.write(contract("0.98", "holds"), tmp_path / "committed.ipynb")
    assert not differences(tmp_path / "committed.ipynb", contract("0.97", "holds"), request)
    assert differences(tmp_path / "committed.ipynb", contract("0.98", "fails"), request)
