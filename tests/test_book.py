"""The shape of the book: what every tutorial has, and what none may have."""

import ast
import re

import nbformat
import pytest
import yaml
from conftest import NOTEBOOKS, ROOT, THEMES
from IPython.core.inputtransformer2 import TransformerManager
from pybtex.database import parse_file

from companion import claims
from tools.strip import strip

PAPERS = sorted(path for theme in THEMES for path in (ROOT / "companion" / theme).glob("[!_]*.py"))
CHAPTERS = {
    chapter["file"]
    for part in yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    for chapter in part["chapters"]
}
REFERENCES = set(parse_file(ROOT / "book" / "references.bib").entries)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return cell.metadata.get("tags", [])


def is_exercise(cell):
    return "nbgrader" in cell.metadata


def parsed(cell):
    """The syntax tree of a code cell, with IPython's magics as function calls."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def calls(notebook, names):
    """Calls of functions of these names outside exercises."""
    for cell in code_cells(notebook):
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                yield node


def test_every_paper_has_its_three_rooms_and_a_place_in_the_contents():
    names = {(path.parent.name, path.stem) for path in PAPERS} | {(path.parent.name, path.stem) for path in NOTEBOOKS}
    assert names, "no tutorial was found"
    for theme, slug in names:
        assert (ROOT / "book" / theme / f"{slug}.ipynb").exists()
        assert (ROOT / "companion" / theme / f"{slug}.py").exists()
        assert (ROOT / "tests" / theme / f"test_{slug}.py").exists()
        assert f"{theme}/{slug}" in CHAPTERS


def test_every_page_is_in_the_contents():
    pages = {str(path.relative_to(ROOT / "book").with_suffix("")) for path in (ROOT / "book").rglob("*.md")}
    assert pages - {"index"} == {chapter for chapter in CHAPTERS if (ROOT / "book" / f"{chapter}.md").exists()}


def test_only_the_contract_cell_keeps_its_output(notebook):
    kept = [cell for cell in code_cells(notebook) if cell.outputs or cell.execution_count]
    assert [tags(cell) for cell in kept] == [["keep_output", "nbval-check-output"]]
    assert kept[0].source == "report"
    before = nbformat.writes(notebook)
    assert nbformat.writes(strip(notebook)) == before, "run `python -m tools.strip` on the notebook"


def test_claims_hold_and_have_a_control(notebook_path, notebook):
    (output,) = [output for cell in code_cells(notebook) for output in cell.outputs]
    report = claims.Report.from_dict(output.metadata[claims.METADATA_KEY])
    assert report.tutorial == f"{notebook_path.parent.name}/{notebook_path.stem}"
    assert not [claim.id for claim in report.claims if claim.verdict == "fails"]
    assert any(claim.control for claim in report.claims)
    assert "".join(output.data["text/plain"]) == str(report), "the shown report differs from the stored one"


def test_exercises_are_graded(notebook):
    metadata = [cell.metadata.nbgrader for cell in code_cells(notebook) if is_exercise(cell)]
    graded = [cell for cell in code_cells(notebook) if is_exercise(cell) and cell.metadata.nbgrader.grade]
    assert sum(entry.solution for entry in metadata) >= 2
    assert len(graded) >= 2
    for cell in graded:
        assert cell.metadata.nbgrader.points > 0
        visible, *hidden = cell.source.split("### BEGIN HIDDEN TESTS")
        assert "assert" in visible
        assert "assert" in "".join(hidden)
    assert all("hide-input" in tags(cell) for cell in code_cells(notebook) if is_exercise(cell))


def test_every_figure_has_a_caption_and_alternative_text(notebook):
    figures = list(calls(notebook, {"show", "show_slider"}))
    assert figures
    for call in figures:
        texts = {keyword.arg for keyword in call.keywords}
        assert {"caption", "alt"} <= texts, f"line {call.lineno} of a cell shows a figure without caption and alt"
    cards = [call for call in figures if any(k.arg == "card" and k.value.value is True for k in call.keywords)]
    assert len(cards) == 1, "one figure must have card=True"
    drawn = sum(len(list(calls(notebook, {name}))) for name in ("subplots", "figure"))
    assert not drawn or figures
    assert not list(calls(notebook, {"imsave", "to_jshtml"}))


def test_what_only_presents_is_folded_on_the_site(notebook):
    for cell in code_cells(notebook):
        presents = "plotting.show" in cell.source and len(cell.source.splitlines()) > 12
        if not is_exercise(cell) and (presents or "runtime.settings(" in cell.source or "report.check(" in cell.source):
            assert "hide-input" in tags(cell)
            assert cell.metadata.mystnb.code_prompt_show


def test_citations_resolve(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    cited = {key for keys in re.findall(r"\{cite[:\w]*\}`([^`]+)`", text) for key in re.split(r",\s*", keys)}
    assert cited
    assert cited <= REFERENCES


def test_no_long_function_outside_the_exercises(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(parsed(cell)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not is_exercise(cell):
                assert node.end_lineno - node.lineno < 11, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_no_absolute_path_and_no_large_output(notebook_path):
    text = notebook_path.read_text(encoding="utf-8")
    assert not re.search(r"""["'\s](/(?:home|root|tmp|usr|var|work|Users|mnt)/|[A-Z]:\\\\)""", text)
    for cell in code_cells(nbformat.reads(text, as_version=4)):
        assert len(str(cell.outputs)) < 100_000


def test_set_up_is_in_one_place(notebook):
    sources = [cell.source for cell in code_cells(notebook)]
    assert sum("runtime.settings(" in source for source in sources) == 1
    assert not any("BOOK_PROFILE" in source or "runtime.profile" in source for source in sources)
    assert any("runtime.one_thread()" in source for source in sources)


def test_opening_is_a_title_and_one_paragraph(notebook):
    title, sentence, *_ = notebook.cells[0].source.split("\n\n")
    assert re.fullmatch(r"# [^\n]+", title)
    assert 60 <= len(sentence) <= 400
    assert not re.search(r"[$`\[]", sentence), "the gallery shows the first paragraph as plain text"


@pytest.mark.parametrize("word", ["delve", "TODO", "FIXME", "XXX"])
def test_words_that_no_page_needs(word):
    pages = [*(ROOT / "book").rglob("*.md"), *NOTEBOOKS, *(ROOT / "companion").rglob("*.py")]
    assert not [path for path in pages if word in path.read_text(encoding="utf-8")]
