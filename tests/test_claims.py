"""The contract: bounds, verdicts, what is shown and what is read back."""

import json
import math

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from companion import claims
from companion.claims import above, below, between


def a_report() -> claims.Report:
    report = claims.Report("collapse/example")
    report.check("C1", "errors < 2 % & falling", source="Fig. 1", paper="1.4 %", measured=[1, 1.5, 1.2], bound=below(2))
    report.check("C1-", "the baseline does not", source="Fig. 1", measured=math.inf, bound=above(2), control=True)
    report.check("C2", "holds for ImageNet", source="Table 2", measured=[0.3], bound=between(0.2, 0.4), at_scale=False)
    return report


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (below(2), [1.9, -math.inf], [2.0, math.inf, math.nan]),
        (above(2), [2.1, math.inf], [2.0, -math.inf, math.nan]),
        (between(1, 2), [1.5], [1.0, 2.0, math.inf, -math.inf, math.nan]),
    ],
)
def test_bounds_are_open_and_nan_satisfies_none(bound, inside, outside):
    assert bound.holds(inside)
    assert not any(bound.holds([value]) for value in outside)


@given(st.lists(st.floats(-10, 10), min_size=1), st.floats(-10, 10), st.floats(0.1, 10))
def test_a_bound_holds_when_it_holds_for_every_value(values, lower, width):
    bound = between(lower, lower + width)
    assert bound.holds(values) == all(bound.holds([value]) for value in values)


def test_verdicts_follow_from_measured_values():
    assert [claim.verdict for claim in a_report().claims] == ["holds", "holds", "not at this scale"]
    report = claims.Report("collapse/example")
    report.check("C1", "one seed of three is outside", source="Fig. 1", measured=[1, 1.5, 2.2], bound=below(2))
    report.check("C2", "outside, and not expected here", source="Fig. 1", measured=3, bound=below(2), at_scale=False)
    assert [claim.verdict for claim in report.claims] == ["fails", "fails"]


@pytest.mark.parametrize(
    "measured", [2, 2.0, np.float64(2), torch.tensor(2.0), [2], np.array([2.0]), {"a": 2}.values()]
)
def test_numbers_of_every_kind_are_accepted(measured):
    report = claims.Report("collapse/example")
    report.check("C1", "two", source="Fig. 1", measured=measured, bound=below(3))
    assert report.claims[0].measured == (2.0,)


def test_counts_are_shown_to_the_unit():
    report = claims.Report("collapse/x")
    report.check("C1", "weights", source="ours", measured=[13520, 0.12345, 2e7], bound=claims.above(0))
    assert report.claims[0].summary == "13520 [0.123, 2e+07] n=3"


def test_summary_gives_median_range_and_number():
    assert [claim.summary for claim in a_report().claims] == ["1.2 [1, 1.5] n=3", "inf", "0.3"]


def test_report_survives_json_and_recomputes_verdicts():
    content = json.loads(json.dumps(a_report().to_dict(), allow_nan=False))
    content["claims"][0]["verdict"] = "a lie"
    assert claims.Report.from_dict(content).claims == a_report().claims


def test_html_shows_every_row_escaped():
    data, metadata = a_report()._repr_mimebundle_()
    table = BeautifulSoup(data["text/html"], "html.parser")
    rows = [
        [cell.get_text(" ", strip=True) for cell in row.find_all(["th", "td"])] for row in table.tbody.find_all("tr")
    ]
    assert rows[0] == ["C1", "errors < 2 % & falling Fig. 1", "1.4 %", "1.2 [1, 1.5] n=3", "< 2", "✓ holds"]
    assert rows[1][1] == "the baseline does not control Fig. 1"
    assert rows[2][-1] == "○ not at this scale"
    assert metadata[claims.METADATA_KEY]["tutorial"] == "collapse/example"
    assert data["text/plain"].count("bound:") == 3


def write_notebook(path, outputs):
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = nbformat.v4.new_code_cell("report", outputs=outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


def test_reports_are_read_back_from_notebooks(tmp_path):
    data, metadata = a_report()._repr_mimebundle_()
    output = nbformat.v4.new_output("execute_result", data=data, metadata=metadata)
    write_notebook(tmp_path / "collapse" / "example.ipynb", [output])
    (report,) = claims.read_reports(tmp_path)
    assert report.claims == a_report().claims

    write_notebook(tmp_path / "collapse" / "other.ipynb", [])
    with pytest.raises(ValueError, match=r"other\.ipynb must hold exactly one committed claims report, found 0"):
        claims.read_reports(tmp_path)


def test_bad_input_is_named():
    report = a_report()
    with pytest.raises(ValueError, match="id 'C1' is already"):
        report.check("C1", "again", source="Fig. 1", measured=1, bound=below(2))
    with pytest.raises(ValueError, match="measured of C9 is empty"):
        report.check("C9", "nothing", source="Fig. 1", measured=[], bound=below(2))
    with pytest.raises(TypeError, match="bound of C9 must come from below, above or between, got 2"):
        report.check("C9", "no bound", source="Fig. 1", measured=1, bound=2)
    with pytest.raises(ValueError, match="tutorial must be '<theme>/<slug>', got 'example'"):
        claims.Report("example")
    with pytest.raises(ValueError, match="lower < upper, got lower=3 and upper=2"):
        between(3, 2)
