"""Binder, Colab and the package agree on what the notebooks need."""

import ast
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tomllib
import venv

import nbformat
import pytest
import yaml
from conftest import NOTEBOOKS, ROOT, SCRIPTS
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
CONDA_NAMES = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
COLAB = dict(line.split("==") for line in (ROOT / "tests" / "colab-packages.txt").read_text().split() if "==" in line)


def test_binder_installs_what_the_package_asks_for():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [Requirement(text.replace("=", "==", 1) if text.count("=") == 1 and ">" not in text else text)
             for text in dependencies if isinstance(text, str)]  # fmt: skip
    found = {CONDA_NAMES.get(requirement.name, requirement.name): str(requirement.specifier) for requirement in conda}
    assert {name: str(requirement.specifier) for name, requirement in CORE.items()}.items() <= found.items()
    assert set(found) - set(CORE) == {"python", "jupyterlab", "pip"}
    assert {"pip": ["--editable ."]} in dependencies


def test_binder_accepts_the_checkout():
    command = [SCRIPTS / "jupyter-repo2docker", "--no-build", "--debug", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert '--file "environment.yml"' in result.stderr + result.stdout


def test_our_own_runs_are_pinned_within_the_ranges():
    extras = [Requirement(text) for extra in PROJECT["optional-dependencies"].values() for text in extra]
    for requirement in [*CORE.values(), *extras]:
        if requirement.name != "linear-lens":
            assert requirement.specifier.contains(PINS[requirement.name]), requirement


def test_the_environment_in_use_is_the_pinned_one():
    for name in CORE:
        assert Version(importlib.metadata.version(name)).base_version == PINS[name]


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """A virtual environment in which pip believes Colab's packages to be installed."""
    folder = tmp_path_factory.mktemp("colab")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in COLAB.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    return folder / "bin" / "python"


def test_colab_installs_the_companion_and_replaces_nothing(colab, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "companion", tmp_path / "companion")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", tmp_path]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("dist/linear_lens-*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--python",
        colab,
        "install",
        "--dry-run",
        "--report",
        "-",
        wheel,
    ]
    result = subprocess.run(install, check=True, capture_output=True, text=True)
    new = {entry["metadata"]["name"].lower() for entry in json.loads(result.stdout)["install"]}
    assert "linear-lens" in new
    assert not new & {name.lower() for name in COLAB}, "packages of Colab would be replaced"
    assert len(new) <= 5, "the install is meant to be light"


def test_nothing_is_used_that_colabs_ipython_lacks():
    available = set((ROOT / "tests" / "ipython-7.34-display.txt").read_text().split())
    sources = [path.read_text() for path in (ROOT / "companion").rglob("*.py")]
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        sources += [
            cell.source for cell in cells if cell.cell_type == "code" and "colab" not in cell.metadata.get("tags", [])
        ]
    imported = set()
    for source in sources:
        assert not [line for line in source.splitlines() if line.startswith(("%", "!"))], (
            "magics belong to the Colab cell"
        )
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("IPython"):
                assert node.module == "IPython.display"
                imported |= {alias.name for alias in node.names}
            assert not (isinstance(node, ast.Import) and any(alias.name.startswith("IPython") for alias in node.names))
    assert imported
    assert imported <= available
