"""Measure every notebook: CPU seconds and peak memory of one run from top to bottom, one after the other, no cache."""

import os
import subprocess
import sys
from pathlib import Path

# Runs in a process of its own, so that its children are this notebook's kernel and nothing else.
RUN = """
import resource, sys
import nbformat
from nbclient import NotebookClient
path = sys.argv[1]
resources = {"metadata": {"path": path.rpartition("/")[0]}}
NotebookClient(nbformat.read(path, as_version=4), timeout=None, resources=resources).execute()
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(f"{used.ru_utime + used.ru_stime:8.1f} CPU s {used.ru_maxrss / 2**20:6.2f} GiB  {path}")
"""

if __name__ == "__main__":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    for notebook in sys.argv[1:] or sorted(map(str, Path("book").glob("*/*.ipynb"))):
        subprocess.run([sys.executable, "-c", RUN, notebook], env=environment, check=True)
