"""Give the book a home: write its repository's address to every file that names it.

The address stands in _config.yml (repository.url). What is generated from it: the cell of each notebook that installs
the companion on Colab, the badges of the README, the citation file. An empty address makes the book homeless again.
"""

import argparse
import json
import re
from pathlib import Path

HOMELESS_CELL = """import sys

if "google.colab" in sys.modules:
    raise RuntimeError("This copy of the book has no home address yet; its owner sets one with `make home URL=...`.")"""
COLAB_CELL = """import sys

if "google.colab" in sys.modules:
    %pip install --quiet "linear-lens @ git+{url}\""""
BADGES = """[![Checks]({url}/actions/workflows/check.yml/badge.svg)]({url}/actions/workflows/check.yml)
[![Read the book](https://img.shields.io/badge/read-the_book-0d57e5)]({site})
[![Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/book)
"""


def colab_cell(url: str) -> str:
    """The source of a notebook's Colab cell."""
    return COLAB_CELL.format(url=url) if url else HOMELESS_CELL


def site_address(url: str) -> str:
    """Where GitHub Pages serves the site of a repository."""
    owner, repository = url.removeprefix("https://github.com/").split("/")
    return f"https://{owner.lower()}.github.io/{repository}/"


def badges(url: str) -> str:
    """The README's badges."""
    return BADGES.format(url=url, site=site_address(url), name=url.removeprefix("https://github.com/")) if url else ""


def settle(root: Path, url: str) -> list[Path]:
    """Write the address ``url`` to the files of the checkout ``root``; return the files that changed.

    Raises
    ------
    ValueError
        If the address is neither empty nor ``https://github.com/<owner>/<repo>``.
    """
    if url and not re.fullmatch(r"https://github\.com/[\w-]+/[\w.-]+", url):
        raise ValueError(f"URL must look like https://github.com/<owner>/<repo>, got {url!r}")
    url = url.removesuffix(".git")

    new: dict[Path, str] = {}

    def rewrite(name: str, pattern: str, replacement: str) -> None:
        text = (root / name).read_text(encoding="utf-8")
        text, count = re.subn(pattern, lambda match: replacement, text, flags=re.DOTALL | re.MULTILINE)
        if count != 1:
            raise ValueError(f"{name} must hold the pattern {pattern!r} exactly once, found it {count} times")
        new[root / name] = text

    rewrite("_config.yml", r'^  url: "[^"]*"$', f'  url: "{url}"')
    rewrite("README.md", r"(?<=<!-- badges -->\n).*?(?=<!-- /badges -->)", badges(url))
    citation = f"repository-code: {url}\nurl: {site_address(url)}\n" if url else ""
    rewrite("CITATION.cff", r"(?<=# Written by `make home`:\n).*\Z", citation)
    for path in sorted(root.glob("book/*/*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if "colab" in cell["metadata"].get("tags", []):
                cell["source"] = colab_cell(url).splitlines(keepends=True)
        new[path] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"

    changed = [path for path, text in new.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        path.write_text(new[path], encoding="utf-8")
    return changed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="https://github.com/<owner>/<repo>, or an empty string")
    for path in settle(Path.cwd(), parser.parse_args().url):
        print(f"rewrote {path.relative_to(Path.cwd())}")
