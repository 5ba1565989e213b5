"""Claims as tests: what a paper says, what the notebook measured, and the bound that must hold.

A notebook collects its claims in one :class:`Report` and shows it in its contract cell. The output of that cell is
committed: the tests re-run the notebook and compare, and the scoreboard of the site is read from it.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

METADATA_KEY = "linear_lens"  # where a contract cell's output keeps the report in machine-readable form
_MARKS = {"holds": "✓", "fails": "✗", "not at this scale": "○"}


@dataclass(frozen=True)
class Bound:
    """An open interval in which every measured value must lie; an infinite end is no limit at all."""

    lower: float = -math.inf
    upper: float = math.inf

    def __post_init__(self) -> None:
        if not self.lower < self.upper:
            raise ValueError(f"a bound needs lower < upper, got lower={self.lower!r} and upper={self.upper!r}")

    def holds(self, values: Iterable[float]) -> bool:
        """True when every value lies inside. NaN lies nowhere; "never reached" may be measured as infinity."""
        return all(
            (value > self.lower or self.lower == -math.inf == value)
            and (value < self.upper or self.upper == math.inf == value)
            for value in values
        )

    def __str__(self) -> str:
        if self.lower == -math.inf:
            return f"< {self.upper:g}"
        if self.upper == math.inf:
            return f"> {self.lower:g}"
        return f"in ({self.lower:g}, {self.upper:g})"


def below(upper: float) -> Bound:
    """Every measured value must be smaller than ``upper``."""
    return Bound(upper=upper)


def above(lower: float) -> Bound:
    """Every measured value must be larger than ``lower``."""
    return Bound(lower=lower)


def between(lower: float, upper: float) -> Bound:
    """Every measured value must lie strictly between ``lower`` and ``upper``."""
    return Bound(lower=lower, upper=upper)


def _rounded(value: float) -> str:
    """Three digits; counts and other numbers in the thousands keep their units."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


@dataclass(frozen=True)
class Claim:
    """One row of a claims table; see :meth:`Report.check` for the meaning of the fields."""

    id: str
    statement: str
    source: str
    measured: tuple[float, ...]
    bound: Bound
    paper: str = "–"
    control: bool = False
    at_scale: bool = True

    @property
    def verdict(self) -> str:
        if not self.bound.holds(self.measured):
            return "fails"
        return "holds" if self.at_scale else "not at this scale"

    @property
    def summary(self) -> str:
        """The measured values in words: the median, and the range and number of values when there are several."""
        median = _rounded(statistics.median(self.measured))
        if len(self.measured) == 1:
            return median
        return f"{median} [{_rounded(min(self.measured))}, {_rounded(max(self.measured))}] n={len(self.measured)}"


class Report:
    """The claims of one tutorial, shown as a table and kept in the notebook's committed output.

    Parameters
    ----------
    tutorial
        ``"<theme>/<slug>"``, for example ``"collapse/neural_collapse"``.
    """

    def __init__(self, tutorial: str) -> None:
        if tutorial.count("/") != 1:
            raise ValueError(f"tutorial must be '<theme>/<slug>', got {tutorial!r}")
        self.tutorial = tutorial
        self.claims: list[Claim] = []

    def check(
        self,
        id: str,
        statement: str,
        *,
        source: str,
        measured: float | Iterable[float],
        bound: Bound,
        paper: str = "–",
        control: bool = False,
        at_scale: bool = True,
    ) -> None:
        """Add a row.

        Parameters
        ----------
        id
            Short and unique in the tutorial: ``"C1"``, ``"C2-"`` (a control of C2).
        statement
            What the paper says, or what the control must do; plain text.
        source
            Where the paper says so: a figure, table, section or theorem.
        measured
            What this notebook measured: a number, or one number per seed (or per case).
        bound
            What every measured value must satisfy: ``below``, ``above`` or ``between``.
        paper
            The paper's own number, where there is one.
        control
            True for a negative control: the same measure where the paper says that it must *not* come out.
        at_scale
            False for a statement that is not expected to reproduce here; ``bound`` then says what is seen instead.

        Raises
        ------
        ValueError
            If ``id`` is taken or ``measured`` is empty.
        TypeError
            If ``bound`` is not a :class:`Bound`.
        """
        if any(claim.id == id for claim in self.claims):
            raise ValueError(f"id {id!r} is already in the report of {self.tutorial}; every claim needs its own")
        if not isinstance(bound, Bound):
            raise TypeError(f"bound of {id} must come from below, above or between, got {bound!r}")
        several = isinstance(measured, Iterable) and getattr(measured, "ndim", 1) > 0
        values = tuple(float(value) for value in measured) if several else (float(measured),)
        if not values:
            raise ValueError(f"measured of {id} is empty; give at least one value")
        self.claims.append(Claim(id, statement, source, values, bound, paper, control, at_scale))

    def __str__(self) -> str:
        rows = [
            f"{_MARKS[claim.verdict]} {claim.id}{' (control)' if claim.control else ''}: {claim.verdict}\n"
            f"    {claim.statement} [{claim.source}]\n"
            f"    paper: {claim.paper} | measured: {claim.summary} | bound: {claim.bound}"
            for claim in self.claims
        ]
        return "\n".join([f"Claims of {self.tutorial}", *rows])

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        """HTML and plain text for readers; the numbers themselves in the metadata, which nbval does not compare."""
        return {"text/html": claims_table([self]), "text/plain": str(self)}, {METADATA_KEY: self.to_dict()}

    def to_dict(self) -> dict:
        """Plain data that JSON can hold; infinities and NaN become strings."""
        return {
            "tutorial": self.tutorial,
            "claims": [
                {
                    "id": claim.id,
                    "statement": claim.statement,
                    "source": claim.source,
                    "measured": [value if math.isfinite(value) else str(value) for value in claim.measured],
                    "bound": [
                        end if math.isfinite(end) else str(end) for end in (claim.bound.lower, claim.bound.upper)
                    ],
                    "paper": claim.paper,
                    "control": claim.control,
                    "at_scale": claim.at_scale,
                    "verdict": claim.verdict,
                }
                for claim in self.claims
            ],
        }

    @classmethod
    def from_dict(cls, content: dict) -> Report:
        """The report that :meth:`to_dict` wrote; verdicts are computed again, not read."""
        report = cls(content["tutorial"])
        for row in content["claims"]:
            row = {key: value for key, value in row.items() if key != "verdict"}
            row["bound"] = Bound(*(float(end) for end in row["bound"]))
            row["measured"] = [float(value) for value in row["measured"]]
            report.check(**row)
        return report


def claims_table(reports: Sequence[Report], links: Sequence[str] | None = None) -> str:
    """An HTML table of the claims of one or several reports.

    Parameters
    ----------
    reports
        The reports, in the order of the rows.
    links
        For each report the HTML that names its tutorial; then the table gets a heading row per tutorial.
    """
    rows = []
    for report, link in zip(reports, links or [None] * len(reports), strict=True):
        if link is not None:
            rows.append(f'<tr class="tutorial"><th colspan="6" scope="rowgroup">{link}</th></tr>')
        for claim in report.claims:
            kind = ' <span class="control">control</span>' if claim.control else ""
            verdict = f"{_MARKS[claim.verdict]} {claim.verdict}"
            rows.append(
                f'<tr><th scope="row">{html.escape(claim.id)}</th>'
                f"<td>{html.escape(claim.statement)}{kind} <small>{html.escape(claim.source)}</small></td>"
                f"<td>{html.escape(claim.paper)}</td>"
                f'<td class="measured">{html.escape(claim.summary)}</td>'
                f'<td class="bound">{html.escape(str(claim.bound))}</td>'
                f'<td class="verdict {claim.verdict.split()[0]}">{verdict}</td></tr>'
            )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("", "Claim", "Paper", "Measured", "Bound", "Verdict"))
    return (
        '<div class="claims" role="region" aria-label="Claims and verdicts" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def read_reports(book: Path | str) -> list[Report]:
    """Read the committed report of every notebook below ``book``, in the order of their paths.

    Raises
    ------
    ValueError
        If a notebook has no committed report, or more than one.
    """
    reports = []
    for path in sorted(Path(book).glob("*/*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        found = [
            output["metadata"][METADATA_KEY]
            for cell in cells
            for output in cell.get("outputs", [])
            if METADATA_KEY in output.get("metadata", {})
        ]
        if len(found) != 1:
            raise ValueError(f"{path} must hold exactly one committed claims report, found {len(found)}")
        reports.append(Report.from_dict(found[0]))
    return reports
