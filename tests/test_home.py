"""One home address: one command writes it everywhere, and without it no file points to an account."""

import re
import shutil

import nbformat
import pytest
import yaml
from conftest import ROOT

from tools import home

FIRST, SECOND = "https://github.com/first-owner/book", "https://github.com/second/linear.lens"


@pytest.fixture
def checkout(tmp_path):
    for name in ("_config.yml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "book", tmp_path / "book")
    return tmp_path


def everything(checkout):
    return {path: path.read_bytes() for path in sorted(checkout.rglob("*")) if path.is_file()}


def test_the_address_is_written_everywhere(checkout):
    home.settle(checkout, FIRST)
    assert yaml.safe_load((checkout / "_config.yml").read_text())["repository"]["url"] == FIRST
    assert f"{FIRST}/actions/workflows/check.yml" in (checkout / "README.md").read_text()
    assert "https://first-owner.github.io/book/" in (checkout / "README.md").read_text()
    assert yaml.safe_load((checkout / "CITATION.cff").read_text())["repository-code"] == FIRST
    for path in (checkout / "book").glob("*/*.ipynb"):
        (cell,) = [cell for cell in nbformat.read(path, as_version=4).cells if "colab" in cell.metadata.get("tags", [])]
        assert f'%pip install --quiet "linear-lens @ git+{FIRST}"' in cell.source


def test_moving_house_leaves_nothing_behind_and_can_be_undone(checkout):
    home.settle(checkout, "")
    homeless = everything(checkout)
    assert home.settle(checkout, FIRST)
    home.settle(checkout, SECOND)
    assert not [path for path, content in everything(checkout).items() if b"first-owner" in content]
    assert home.settle(checkout, SECOND) == []
    home.settle(checkout, "")
    assert everything(checkout) == homeless


def test_this_checkout_is_consistent(checkout):
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    assert home.settle(checkout, url) == []


def test_without_a_home_no_file_points_to_an_account(checkout):
    home.settle(checkout, "")
    for path in [*checkout.glob("*.*"), *(checkout / "book").rglob("*.md"), *(checkout / "book").rglob("*.ipynb")]:
        assert not re.findall(
            r"(?:github\.com|mybinder\.org/v2|colab\.research\.google\.com/github)/[\w-]+/[\w.-]+", path.read_text()
        )


@pytest.mark.parametrize("url", ["http://github.com/a/b", "https://github.com/a", "https://example.org/a/b", "a/b"])
def test_other_addresses_are_refused_and_nothing_is_written(checkout, url):
    before = everything(checkout)
    with pytest.raises(ValueError, match=re.escape(f"got {url!r}")):
        home.settle(checkout, url)
    assert everything(checkout) == before
