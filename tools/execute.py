"""Execute the notebooks of the book in parallel, into the cache from which Jupyter Book renders them.

A notebook is executed when its code has changed, or anything that its results depend on: the companion modules it
imports (and what those import), the versions of the companion's dependencies, the Python version or the profile.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path

import grimp
import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_cache import get_cache
from jupyter_cache.cache.db import NbCacheRecord, NbProjectRecord, session_context
from jupyter_cache.executors import load_executor
from packaging.requirements import Requirement

from companion import runtime


def imported_modules(notebook: Path, graph: grimp.ImportGraph) -> set[str]:
    """The companion modules that a notebook imports, with all that those import inside the companion."""
    to_python = TransformerManager().transform_cell  # magics become function calls
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    names = set()
    for node in ast.walk(ast.parse("\n".join(to_python(cell.source) for cell in cells))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    direct = names & graph.modules
    return direct.union(*(graph.find_upstream_modules(module) for module in direct))


def fingerprints(notebooks: list[Path]) -> dict[Path, str]:
    """For each notebook a hash of everything but its own code that its results depend on."""
    graph = grimp.build_graph("companion", cache_dir=None)
    package = Path(runtime.__file__).parent
    requirements = map(Requirement, importlib.metadata.requires("linear-lens"))
    environment = [
        runtime.profile(),
        sys.version,
        *(f"{r.name}=={importlib.metadata.version(r.name)}" for r in requirements if not r.marker),
    ]
    result = {}
    for notebook in notebooks:
        digest = hashlib.sha256("\n".join(environment).encode())
        for module in sorted(imported_modules(notebook, graph)):
            path = package.joinpath(*module.split(".")[1:])
            digest.update(module.encode())
            digest.update((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_bytes())
        result[notebook] = digest.hexdigest()
    return result


def execute(notebooks: list[Path], cache_path: Path) -> dict[str, float]:
    """Bring the cache up to date and return the seconds that each notebook took when it was last executed.

    Raises
    ------
    SystemExit
        If a notebook fails, after all of them were tried; its traceback is printed.
    """
    cache = get_cache(cache_path)
    wanted = fingerprints(notebooks)
    records = {}
    for notebook in notebooks:
        records[notebook] = cache.add_nb_to_project(str(notebook))
        cached = cache.get_cached_project_nb(records[notebook].uri)
        if cached and cached.data.get("fingerprint") != wanted[notebook]:
            cache.remove_cache(cached.pk)

    logger = logging.getLogger("execute")
    logger.setLevel(logging.INFO)
    # Notebooks run side by side: each gets one thread, and no progress bars that only a terminal can show.
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    done = load_executor("local-parallel", cache, logger=logger).run_and_cache(
        filter_uris=[record.uri for record in records.values()], timeout=None
    )
    for uri in done.excepted + done.errored:
        print(f"\n{uri} failed:\n{NbProjectRecord.record_from_uri(uri, cache.db).traceback}", file=sys.stderr)
    if done.excepted or done.errored:
        raise SystemExit(f"{len(done.excepted + done.errored)} of {len(notebooks)} notebooks failed")

    seconds = {}
    for notebook, record in records.items():
        cached = cache.get_cached_project_nb(record.uri)
        data = {**cached.data, "fingerprint": wanted[notebook]}
        if record.uri in done.succeeded:
            with session_context(cache.db) as session:
                session.get(NbCacheRecord, cached.pk).data = data
                session.commit()
        seconds[str(notebook)] = data["execution_seconds"]
    print(f"\nexecuted {len(done.succeeded)} of {len(notebooks)} notebooks, the others were up to date")
    for name, value in sorted(seconds.items()):
        print(f"{value:8.1f} s  {name}")
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("book", type=Path, help="the folder of the book; its notebooks are BOOK/<theme>/<slug>.ipynb")
    parser.add_argument("cache", type=Path, help="the folder of the cache")
    parser.add_argument("report", type=Path, help="where to write the seconds of each notebook, as JSON")
    arguments = parser.parse_args()
    times = execute(sorted(arguments.book.glob("*/*.ipynb")), arguments.cache)
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
