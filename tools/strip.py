"""Strip notebooks for the repository: no outputs but those of the contract cell, no counts but its own, cell ids kept.

nbstripout does the work. The contract cell needs a count, because nbval takes a cell with outputs but without a count
for one that was never run.
"""

import sys
from pathlib import Path

import nbformat
from nbstripout import strip_output


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is committed; ``notebook`` itself is changed."""
    extra = ["metadata.jupytext", "metadata.widgets", "cell.metadata.execution"]
    strip_output(notebook, keep_output=False, keep_count=False, keep_id=True, extra_keys=extra)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.outputs:
            cell.execution_count = 1
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = 1
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(strip(nbformat.read(name, as_version=4)), Path(name))
